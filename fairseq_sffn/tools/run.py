"""Trains and evaluates the models of a study's table."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from ..errors import UsageError
from ..study.dry_run import dry_run
from ..study.plan import Cell, Scale, Table, load_scale, load_table, row_cells, sweep_cells
from ..study.results import WHOLE, Results, missing
from ..study.runner import Runner, fingerprint, submit


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
    parser.add_argument("--jobs", type=int, help="trainings at a time (default: one for each core)")
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
    jobs = len(os.sched_getaffinity(0)) if args.jobs is None else args.jobs
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: must be at least 1")
    launcher = scale.launchers[name]
    rows = [row for table in tables for row in table.rows]

    def say(line: str) -> None:
        print(line, flush=True)

    if args.dry_run:
        cells = [cell for row in rows for cell in row_cells(row, scale, scale.learning_rates[0])]
        for line in dry_run(cells, scale, launcher):
            say(line)
        return f"{len(cells)} trainings are ready"
    data = fingerprint(scale)
    folder = args.results or args.tables[0].parent / "results" / scale.name
    results = Results(folder, scale, data)
    work = args.work / scale.name
    runner = Runner(scale, launcher, results, work, data, jobs, say)
    sweeps = missing((cell for row in rows for cell in sweep_cells(row, scale)), results)
    # Learning rates change no time.
    cells = list(dict.fromkeys(cell for table in tables for cell in to_do(table, results)))
    say(f"up to {len(sweeps) + len(cells)} trainings: {expected(sweeps + cells, scale, jobs)}")
    say(f"{len(sweeps)} to choose learning rates: {expected(sweeps, scale, jobs)}")
    with ended_by_signals():
        runner.run(sweeps, sweep=True)
        for table in tables:
            todo = [cell for cell in to_do(table, results) if args.only in (None, cell.key(scale))]
            say(f"{table.name}: {len(todo)} trainings: {expected(todo, scale, jobs)}")
            if launcher.submit and not args.only:
                for line in submit(todo, scale, launcher, work, again(args)):
                    say(line)
            else:
                runner.run(todo, sweep=False, zero_shot=table.zero_shot)
    return f"results are in {folder}"


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Trainings end with this process when it is terminated too, and at Ctrl-C where a shell made
    it ignore that, as in the background."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
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
    """How long trainings take."""
    seconds = sum(cell.expected_seconds(scale) for cell in cells)
    return f"about {seconds / jobs / 60:.0f} minutes, {jobs} at a time"
