"""Progress of runs: a bar on a terminal, lines in a log."""

import sys
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fairseq_sffn.tools.training_log import log_records

from .files import Scale
from .plan import Run

FORMAT = "{percentage:3.0f}% {elapsed}, {remaining} left{postfix}"
"""Format of the progress bar."""
TERMINAL_SECONDS, LOG_SECONDS = 1, 60
"""Time between two progress bars, on a terminal and in a log."""


@dataclass
class Progress:
    """Context manager that shows how much of the expected time of some runs is done."""

    runs: Sequence[Run]
    scale: Scale
    work: Path  # folder for logs and checkpoints
    later: bool = False  # the runs may have begun before: the time left is estimated from now on

    def __enter__(self) -> "Progress":
        self.seconds = {run: run.expected_seconds(self.scale) for run in self.runs}
        total = sum(self.seconds.values())
        self.bar = tqdm(total=total, bar_format=FORMAT, smoothing=0, disable=not self.runs)
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    @property
    def interval(self) -> int:
        """Seconds between two bars."""
        return TERMINAL_SECONDS if sys.stderr.isatty() else LOG_SECONDS

    def show(self, finished: Collection[Run], active: Container[Run]) -> None:
        """Show the bar. Of active runs, the updates in their logs count."""
        done = sum(self.seconds[run] * self.share(run, finished, active) for run in self.runs)
        if self.later:
            self.bar.initial, self.later = done, False
        self.bar.n = done
        self.bar.set_postfix_str(f"{len(finished)}/{len(self.runs)} runs")

    def say(self, run: Run, failure: str) -> None:
        """Print a line on a run that has ended. ``failure`` is empty if it has a result."""
        said = f"failed: {failure}" if failure else "done"
        self.bar.write(f"{run.key(self.scale)} {said}")

    def share(self, run: Run, finished: Container[Run], active: Container[Run]) -> float:
        """Return the share of a run's updates that are done, by its log."""
        log = self.work / run.key(self.scale) / "train.log"
        if run in finished:
            return 1.0
        if run not in active or not log.exists():
            return 0.0
        records = log_records(log)
        return records[-1][1]["num_updates"] / run.updates if records else 0.0


def summary(failures: Sequence[str], runs: Sequence[Run]) -> str:
    """Return one line on runs that failed."""
    among = "" if len(runs) == 1 else f"{len(failures)} of {len(runs)} runs failed: "
    return f"{among}{failures[0]}"
