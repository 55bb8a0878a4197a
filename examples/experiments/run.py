"""Trains and evaluates the models of tables, skips finished runs and resumes interrupted ones."""

import argparse
import contextlib
import shlex
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from fairseq_sffn.errors import UsageError

from .data import check_zero_shot, fingerprint
from .dry_run import dry_run, parse
from .files import Launcher, Scale, load_scale, load_table
from .frame import ROW, STAGES, SWEEP, Experiments
from .plan import Run, domains_of, train_arguments
from .processes import PLUGIN, cores
from .results import Results
from .runner import Runner
from .slurm import Slurm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add, jobs = parser.add_argument, "one for each core; on GPUs, and with a launcher's command, 1"
    dry = "train nothing: build each model, parse all flags, train a narrow copy for one update"
    add("tables", nargs="+", type=Path, help="TOML files: rows of models and flags")
    add("--scale", type=Path, required=True, help="TOML file: how large, how long, which data")
    add("--results", type=Path, help="folder (default: results/SCALE beside the first table)")
    add("--work", type=Path, default=Path("runs/experiments"), help="folder of logs, checkpoints")
    add("--jobs", type=int, help=f"runs at a time, which share the cores (default: {jobs})")
    add("--launcher", help="one of the scale's launchers (default: the first)")
    add("--only", metavar="KEY", help="one run, by the name of its result")
    add("--dry-run", action="store_true", help=dry)


def run(args: argparse.Namespace) -> str:
    """Train and evaluate all runs that have no result yet."""
    scale = load_scale(args.scale)
    launcher, jobs = chosen_launcher(args, scale)
    tables = {path.stem: load_table(path) for path in args.tables}
    if len(tables) < len(args.tables):
        raise UsageError(f"{', '.join(map(str, args.tables))}: are tables of the same name")
    folder = args.results or args.tables[0].parent / "results" / scale.name
    if args.dry_run:
        frame = Experiments(scale, Results(folder, scale), tables).frame
        runs = frame[frame.stage == ROW].drop_duplicates("run")
        check(runs, scale, launcher)
        say(dry_run(runs, scale, launcher))
        return f"{len(runs)} runs are ready"
    if not any(row.seeds for table in tables.values() for row in table.rows):
        return "nothing is trained for these tables"
    with_tasks = [name for name, table in tables.items() if table.zero_shot]
    if with_tasks:
        check_zero_shot(scale)
    data = fingerprint(scale)
    results = Results(folder, scale, data)
    results.check_domains([domain.name for domain in domains_of(scale)])
    # Runs on another text have another folder.
    shared = (scale, launcher, results, args.work / scale.name / data, data)
    submits = launcher.submit and not args.only
    runner = Slurm(*shared, again(args)) if submits else Runner(*shared, jobs)

    def todo() -> pd.DataFrame:
        """Return what is not done yet, by seed. All runs of a row are, until its setting is
        chosen."""
        frame = Experiments(scale, results, tables).frame
        check_settings(frame, scale)
        frame = frame[[args.only in (None, run.key(scale)) for run in frame.run]]
        if frame.empty:
            raise UsageError(f"--only {args.only}: is no run of {', '.join(tables)}")
        return frame[~frame.done].sort_values("seed", kind="stable")

    def finish(frame: pd.DataFrame, stage: str) -> None:
        # All tables together, so that no core waits for the last run of each table.
        frame = frame[frame.stage == stage]
        runs = list(frame.run.unique())
        zero_shot = {*frame.run[frame.table.isin(with_tasks) & (stage == ROW)]}
        runner.run(runs, stage == SWEEP, zero_shot)

    frame = todo()
    check(frame, scale, launcher)
    at_once = launcher.at_once or max(1, frame.run.nunique()) if submits else jobs
    say(expected(frame, scale, at_once))
    with ended_by_signals(f"stopped; {runner.goes_on}"):
        for stage in STAGES:
            if (frame.stage == stage).any():
                finish(frame, stage)
                frame = todo()
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


def check(frame: pd.DataFrame, scale: Scale, launcher: Launcher) -> None:
    """Check that the commands of runs can be parsed."""
    commands = {
        (one.run.model, one.run.flags, one.run.batch_size): one for one in frame.itertuples()
    }
    for entry in commands.values():
        try:
            parse(train_arguments(entry.run, scale, launcher, "DATA", "FOLDER", str(PLUGIN)))
        except UsageError as error:
            raise UsageError(f"{entry.table}, row {entry.label!r}: {error}") from error


def check_settings(frame: pd.DataFrame, scale: Scale) -> None:
    """Check that not all runs of a sweep diverged, nor all of its finalists."""
    choosing = frame[frame.stage != ROW]
    for (_, label, _), runs in choosing.groupby(["table", "label", "stage"]):
        if runs.diverged.all():
            rates = ", ".join(f"{rate:g}" for rate in scale.learning_rates)
            why = f"learning_rates {rates} of scale {scale.name}: all diverged; add lower ones"
            raise UsageError(f"row {label!r}: {why}")


def expected(frame: pd.DataFrame, scale: Scale, jobs: int) -> Iterator[str]:
    """Estimate the time of each table's runs, without their evaluation."""
    for name, group in [*frame.groupby("table"), ("all", frame)]:
        runs: list[Run] = list(group.run.unique())
        minutes = sum(run.expected_seconds(scale) for run in runs) / jobs / 60
        yield f"{name}: at most {len(runs)} runs, about {minutes:.0f} minutes, {jobs} at a time"


@contextlib.contextmanager
def ended_by_signals(said: str) -> Iterator[None]:
    """End with a line when this process is terminated, when its terminal is closed, and at Ctrl-C,
    also where a shell made a background process ignore that. The runner ends its processes."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    except KeyboardInterrupt:
        raise UsageError(said) from None
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
