"""Trains and evaluates the models of a study's table."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
import signal
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import UsageError
from ..study.dry_run import dry_run, parse
from ..study.environment import PLUGIN, cores
from ..study.files import load_scale, load_table
from ..study.outcomes import build_model
from ..study.plan import (
    Cell,
    Launcher,
    Row,
    Scale,
    Table,
    domains_of,
    row_cells,
    sweep_cells,
    train_arguments,
)
from ..study.results import WHOLE, Results, missing
from ..study.runner import Runner, fingerprint
from ..study.submission import submit
from .zero_shot import build_encoder
from .zero_shot_tasks import TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("tables", nargs="+", type=Path, help="TOML files: rows of models and flags")
    parser.add_argument(
        "--scale", type=Path, required=True, help="TOML file: how large, how long, which data"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="folder of the JSON files (default: results/SCALE beside the first table)",
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/study"), help="folder for logs and checkpoints"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="trainings at a time, which share the cores (default: one for each core; one at a "
        "time without --cpu in the scale's flags, or where the launcher has a command)",
    )
    parser.add_argument("--launcher", help="one of the scale's (default: the first)")
    parser.add_argument("--only", metavar="KEY", help="one training, by the name of its result")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: build each model without memory for it, parse all flags, and train a "
        "narrow copy for an update",
    )


def run(args: argparse.Namespace) -> str:
    """Runs what has no result yet.

    Raises:
        UsageError: a file or a flag is wrong, or a training failed.
    """
    scale = load_scale(args.scale)
    tables = [load_table(path) for path in args.tables]
    name = args.launcher or next(iter(scale.launchers))
    if name not in scale.launchers:
        raise UsageError(f"--launcher {name}: is none of {', '.join(scale.launchers)}")
    launcher = scale.launchers[name]
    alone = launcher.command or "--cpu" not in shlex.split(scale.flags)
    jobs = args.jobs if args.jobs is not None else 1 if alone else cores()
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: must be at least 1")
    rows = [row for table in tables for row in table.rows]
    names = [table.name for table in tables]
    if twice := [path for path in args.tables if names.count(path.stem) > 1]:
        raise UsageError(f"{', '.join(map(str, twice))}: are tables of the same name")

    def say(line: str) -> None:
        print(line, flush=True)

    check(tables, scale, launcher)
    if args.dry_run:
        ready = [cell for row in rows for cell in row_cells(row, scale, scale.learning_rates[0])]
        cells = list(dict.fromkeys(ready))
        for line in dry_run(cells, scale, launcher):
            say(line)
        return f"{len(cells)} trainings are ready"
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
    # A text of its own has trainings of its own.
    work = args.work / scale.name / data
    runner = Runner(scale, launcher, results, work, data, jobs, say)

    def chosen(cells: Iterable[Cell]) -> list[Cell]:
        return [cell for cell in cells if args.only in (None, cell.key(scale))]

    def finish(cells: list[Cell], sweep: bool, zero_shot: Container[Cell] = ()) -> None:
        if not launcher.submit or args.only:
            runner.run(cells, sweep, zero_shot)
            return
        for line in submit(cells, scale, launcher, work, again(args)):
            say(line)

    sweeps = missing((cell for row in rows for cell in sweep_cells(row, scale)), results)
    # Learning rates change no time.
    cells = list(dict.fromkeys(cell for table in tables for cell in to_do(table, results)))
    check_models(tables, chosen(sweeps + cells), scale)
    say(f"up to {len(sweeps) + len(cells)} trainings: {expected(sweeps + cells, scale, jobs)}")
    say(f"{len(sweeps)} to choose learning rates: {expected(sweeps, scale, jobs)}")
    with ended_by_signals():
        finish(chosen(sweeps), sweep=True)
        if launcher.submit and sweeps and not args.only:
            return "when these have ended, the same command submits the others"
        check_learning_rates(rows, results)
        todo = {table.name: chosen(to_do(table, results)) for table in tables}
        for name, of_table in todo.items():
            say(f"{name}: {len(of_table)} trainings: {expected(of_table, scale, jobs)}")
        zero_shot = {cell for table in tables if table.zero_shot for cell in todo[table.name]}
        # Of all tables together, so that no core waits for the last training of each.
        cells = list(dict.fromkeys(itertools.chain.from_iterable(todo.values())))
        finish(cells, sweep=False, zero_shot=zero_shot)
    return f"results are in {folder}"


def check(tables: Sequence[Table], scale: Scale, launcher: Launcher) -> None:
    """Looks at all trainings before any is begun.

    Raises:
        UsageError: fairseq-train would not take the flags of one.
    """
    seen = set()
    for table in tables:
        for row in table.rows:
            try:
                rate = scale.learning_rates[0]
                for cell in [*row_cells(row, scale, rate), *sweep_cells(row, scale)]:
                    words = train_arguments(cell, scale, launcher, "DATA", "FOLDER", str(PLUGIN))
                    if (cell.model, cell.flags) not in seen:
                        parse(words)
                        seen.add((cell.model, cell.flags))
            except UsageError as error:
                raise UsageError(f"{table.name}, row {row.label!r}: {error}") from error


def check_models(tables: Sequence[Table], cells: Iterable[Cell], scale: Scale) -> None:
    """Raises UsageError where a model that is to be trained cannot be built."""
    wanted = {(cell.model, cell.flags) for cell in cells}
    for table in tables:
        for row in table.rows:
            trained = [*row_cells(row, scale, 0.0), *sweep_cells(row, scale)]
            for model in wanted & {(cell.model, cell.flags) for cell in trained}:
                wanted.remove(model)
                try:
                    build_model(*model, scale)
                except UsageError as error:
                    raise UsageError(f"{table.name}, row {row.label!r}: {error}") from error


def check_zero_shot(scale: Scale) -> None:
    """Raises UsageError unless a scale has all that zero-shot tasks need."""
    where = f"of scale {scale.name}"
    for task in TASKS:
        if not (Path(scale.requests) / f"{task}.jsonl").is_file():
            raise UsageError(
                f"requests {scale.requests!r} {where}: has no {task}.jsonl; see "
                "examples/data/README.md"
            )
    words = shlex.split(scale.encoder)
    if "--bpe" not in words[:-1]:
        raise UsageError(f"encoder {scale.encoder!r} {where}: has no --bpe")
    i = words.index("--bpe")
    try:
        build_encoder(words[i + 1], [*words[:i], *words[i + 2 :]])
    except UsageError as error:
        raise UsageError(f"encoder {where}: {error}") from error


def check_learning_rates(rows: Iterable[Row], results: Results) -> None:
    """Raises UsageError where none of a sweep's learning rates can be used."""
    for row in rows:
        swept = [results.get(cell) for cell in sweep_cells(row, results.scale)]
        if swept and all(swept) and results.learning_rate(row) is None:
            rates = ", ".join(f"{rate:g}" for rate in results.scale.learning_rates)
            raise UsageError(
                f"row {row.label!r}: learning_rates {rates} of scale {results.scale.name}: all "
                "diverged; add lower ones"
            )


def check_only(key: str, tables: Sequence[Table], results: Results) -> None:
    """Raises UsageError unless it names a training of these tables."""
    scale = results.scale
    for table in tables:
        for row in table.rows:
            cells = row_cells(row, scale, results.learning_rate(row) or 0.0)
            if key in {cell.key(scale) for cell in [*cells, *sweep_cells(row, scale)]}:
                return
    raise UsageError(f"--only {key}: is no training of {', '.join(t.name for t in tables)}")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Trainings end with this process when it is terminated or its terminal closed too, and at
    Ctrl-C where a shell made it ignore that, as in the background.

    Raises:
        UsageError: it was.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    except KeyboardInterrupt:
        raise UsageError("stopped; the same command goes on where this one was") from None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def again(args: argparse.Namespace) -> list[str]:
    """The command line of the same run."""
    words = ["run", *map(str, args.tables), "--scale", str(args.scale), "--work", str(args.work)]
    for name in ("results", "jobs", "launcher"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", str(value)]
    return words


def to_do(table: Table, results: Results) -> list[Cell]:
    """The trainings of a table whose results are not there, or not whole. Before a row's learning
    rate is chosen they are all there are."""
    cells = [
        cell
        for row in table.rows
        for cell in row_cells(row, results.scale, results.learning_rate(row) or 0.0)
    ]
    return missing(cells, results, "zero_shot" if table.zero_shot else WHOLE)


def expected(cells: list[Cell], scale: Scale, jobs: int) -> str:
    """How long trainings take, evaluation apart."""
    seconds = sum(cell.expected_seconds(scale) for cell in cells)
    return f"about {seconds / jobs / 60:.0f} minutes, {jobs} at a time"
