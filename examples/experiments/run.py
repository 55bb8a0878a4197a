"""Trains and evaluates the models of tables, skips finished runs and resumes interrupted ones."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
import signal
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

from fairseq_sffn.errors import UsageError

from .data import check_zero_shot, fingerprint
from .dry_run import dry_run, parse
from .files import Launcher, Row, Scale, Table, load_scale, load_table
from .frame import build_model
from .plan import Run, domains_of, row_runs, sweep_runs, train_arguments
from .processes import PLUGIN, cores
from .results import EVALUATED, Results, missing
from .runner import Runner
from .slurm import submit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("tables", nargs="+", type=Path, help="TOML files: rows of models and flags")
    add("--scale", type=Path, required=True, help="TOML file: how large, how long, which data")
    add(
        "--results",
        type=Path,
        help="folder of the JSON files (default: results/SCALE beside the first table)",
    )
    add("--work", type=Path, default=Path("runs/experiments"), help="folder of logs, checkpoints")
    add(
        "--jobs",
        type=int,
        help="runs at a time, which share the cores (default: one for each core; one in total "
        "without --cpu in the scale's flags, or where the launcher has a command)",
    )
    add("--launcher", help="one of the scale's launchers (default: the first)")
    add("--only", metavar="KEY", help="one run, by the name of its result")
    add(
        "--dry-run",
        action="store_true",
        help="train nothing: build each model without memory for its parameters, parse all flags, "
        "and train a narrow copy for one update",
    )


def run(args: argparse.Namespace) -> str:
    """Train and evaluate all runs that have no result yet."""
    scale = load_scale(args.scale)
    tables = [load_table(path) for path in args.tables]
    launcher, jobs = chosen_launcher(args, scale)
    names = [table.name for table in tables]
    if twice := [path for path in args.tables if names.count(path.stem) > 1]:
        raise UsageError(f"{', '.join(map(str, twice))}: are tables of the same name")
    rows = [row for table in tables for row in table.rows]
    if args.dry_run:
        ready = {run: 0 for row in rows for run in row_runs(row, scale, scale.learning_rates[0])}
        check_runs(ready, tables, scale, launcher)
        say(dry_run([*ready], scale, launcher))
        return f"{len(ready)} runs are ready"
    if not any(row.seeds for row in rows):
        return "nothing is trained for these tables"
    if any(table.zero_shot for table in tables):
        check_zero_shot(scale)
    data = fingerprint(scale)
    folder = args.results or args.tables[0].parent / "results" / scale.name
    results = Results(folder, scale, data)
    results.check_domains([domain.name for domain in domains_of(scale)])
    if args.only:
        check_only(args.only, tables, results)
    # Runs on another text have another folder.
    work = args.work / scale.name / data
    runner = Runner(scale, launcher, results, work, data, jobs)

    def chosen(runs: Iterable[Run]) -> list[Run]:
        return [run for run in runs if args.only in (None, run.key(scale))]

    def finish(runs: list[Run], sweep: bool, zero_shot: Container[Run] = ()) -> None:
        if not launcher.submit or args.only:
            runner.run(runs, sweep, zero_shot)
        else:
            say(submit(runs, scale, launcher, work, again(args)))

    sweeps = missing((run for row in rows for run in sweep_runs(row, scale)), results)
    # Learning rates do not change the time of a run.
    runs = [*dict.fromkeys(run for table in tables for run in to_do(table, results))]
    check_runs(chosen(sweeps + runs), tables, scale, launcher)
    say(expected({"at most": sweeps + runs, "learning rates": sweeps}, scale, jobs))
    with ended_by_signals():
        finish(chosen(sweeps), sweep=True)
        if launcher.submit and sweeps and not args.only:
            return "when these have ended, the same command submits the others"
        check_learning_rates(rows, results)
        todo = {table.name: chosen(to_do(table, results)) for table in tables}
        say(expected(todo, scale, jobs))
        zero_shot = {run for table in tables if table.zero_shot for run in todo[table.name]}
        # All tables together, so that no core waits for the last run of each table.
        finish([*dict.fromkeys(itertools.chain(*todo.values()))], sweep=False, zero_shot=zero_shot)
    return f"results are in {folder}"


def say(lines: Iterable[str]) -> None:
    """Print lines as they come."""
    for line in lines:
        print(line, flush=True)


def chosen_launcher(args: argparse.Namespace, scale: Scale) -> tuple[Launcher, int]:
    """Return the launcher, and how many runs it starts at a time."""
    name = args.launcher or next(iter(scale.launchers))
    if name not in scale.launchers:
        raise UsageError(f"--launcher {name}: is none of {', '.join(scale.launchers)}")
    launcher = scale.launchers[name]
    alone = launcher.command or "--cpu" not in shlex.split(scale.flags)
    jobs = args.jobs if args.jobs is not None else 1 if alone else cores()
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: must be at least 1")
    return launcher, jobs


def runs_of(row: Row, scale: Scale, lr: float) -> list[Run]:
    """Return the runs of a row and of its sweep."""
    return [*row_runs(row, scale, lr), *sweep_runs(row, scale)]


def check_runs(
    runs: Iterable[Run], tables: Iterable[Table], scale: Scale, launcher: Launcher
) -> None:
    """Check that the commands of runs can be parsed and that their models can be built."""
    wanted = {(run.model, run.flags, run.batch_size): run for run in runs}
    for table, row in ((one, row) for one in tables for row in one.rows):
        names = {(run.model, run.flags, run.batch_size) for run in runs_of(row, scale, 0.0)}
        for run in [wanted.pop(name) for name in wanted.keys() & names]:
            try:
                parse(train_arguments(run, scale, launcher, "DATA", "FOLDER", str(PLUGIN)))
                build_model(run.model, run.flags, scale)
            except UsageError as error:
                raise UsageError(f"{table.name}, row {row.label!r}: {error}") from error


def check_learning_rates(rows: Iterable[Row], results: Results) -> None:
    """Check that no sweep diverged at all of its learning rates."""
    for row in rows:
        swept = [results.get(run) for run in sweep_runs(row, results.scale)]
        if swept and all(swept) and results.learning_rate(row) is None:
            rates = ", ".join(f"{rate:g}" for rate in results.scale.learning_rates)
            raise UsageError(
                f"row {row.label!r}: learning_rates {rates} of scale {results.scale.name}: all "
                "diverged; add lower ones"
            )


def check_only(key: str, tables: Iterable[Table], results: Results) -> None:
    """Check that a key names a run of some tables."""
    rows = [row for table in tables for row in table.rows]
    runs = (
        r for row in rows for r in runs_of(row, results.scale, results.learning_rate(row) or 0.0)
    )
    if key not in {run.key(results.scale) for run in runs}:
        names = ", ".join(table.name for table in tables)
        raise UsageError(f"--only {key}: is no run of {names}")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """End the runs when this process is terminated, when its terminal is closed, and at Ctrl-C,
    also where a shell made a background process ignore that."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    except KeyboardInterrupt:
        raise UsageError("stopped; the same command resumes the runs") from None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def again(args: argparse.Namespace) -> list[str]:
    """Return the arguments of this command."""
    words = ["run", *map(str, args.tables), "--scale", str(args.scale), "--work", str(args.work)]
    for name in ("results", "jobs", "launcher"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", str(value)]
    return words


def to_do(table: Table, results: Results) -> list[Run]:
    """Return the runs of a table whose results are missing or incomplete: all of them where the
    learning rate of a row is not chosen yet."""
    rates = ((row, results.learning_rate(row) or 0.0) for row in table.rows)
    runs = (run for row, lr in rates for run in row_runs(row, results.scale, lr))
    return missing(runs, results, "zero_shot" if table.zero_shot else EVALUATED)


def expected(runs: Mapping[str, list[Run]], scale: Scale, jobs: int) -> Iterator[str]:
    """Estimate the time of named groups of runs, without their evaluation."""
    for name, group in runs.items():
        minutes = sum(run.expected_seconds(scale) for run in group) / jobs / 60
        yield f"{name}: {len(group)} runs, about {minutes:.0f} minutes, {jobs} at a time"
