"""Runs points in separate processes, so that one may crash or hang without the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .point import Point, Row, Setting

POLL_SECONDS = 0.2
FAKE_PATIENCE = 5
"""Factor on the time limits with ``--fake``. The limits are for machines with a GPU, and machines
that run tests can be slower."""

LOG_LINES = 15
"""Number of last lines of a dead process's output that are reported."""

Event = dict[str, Any]


class Result(NamedTuple):
    """The result of a point.

    Attributes:
        status: ``passed``, ``failed``, ``cut`` (stopped by its time limit), ``not run``, or
            ``measured`` where nothing can fail.
        error: the traceback of an exception, or why the point ended early.
    """

    point: Point
    status: str
    seconds: float
    rows: list[Row]
    error: str | None = None

    @property
    def bad(self) -> bool:
        """Whether the point makes the whole run fail."""
        return self.status not in ("passed", "measured")

    def count(self, passed: bool) -> int:
        """Count the checks that passed, or that failed."""
        return sum(row["passed"] is passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return all fields except the function."""
        about = {"number": self.point.number, "title": self.point.title}
        result = about | {"status": self.status, "seconds": round(self.seconds, 1)}
        return result | ({"error": self.error} if self.error else {}) | {"rows": self.rows}


def judged(point: Point, seconds: float, rows: list[Row], error: str | None = None) -> Result:
    """Return the result of a point that ended without being stopped."""
    failed = error is not None or any(row["passed"] is False for row in rows)
    checked = any(row["passed"] is not None for row in rows)
    status = "failed" if failed else "passed" if checked else "measured"
    return Result(point, status, seconds, rows, error)


# In the process of the points.


def check_all(points: list[Point], setting: Setting, emit: Callable[[Event], None]) -> None:
    """Check one point after the other. An exception ends its point only."""
    for point in points:
        emit({"begin": point.name})
        error = None
        try:
            for row in point.check(setting):
                emit({"row": row})
        except (Exception, SystemExit):  # SystemExit: a command refused its arguments
            error = traceback.format_exc()
        emit({"end": point.name, "error": error})


# In the process that starts the others.


def run_points(
    points: list[Point],
    setting: Setting,
    command: Callable[[list[Point], Path], list[str]],
    minutes: float,
    told: Callable[[Point, float], None],
) -> Iterator[Result]:
    """Run points in order, each in its own process. With ``--fake`` all share one, as starting a
    process takes longer than most points.

    Args:
        command: function that returns the command line of a process that appends the events of
            points to a file.
        minutes: time limit of all points together.
        told: function that is called as a point begins, with the seconds left for all points.
    """
    pending, deadline = list(points), time.monotonic() + 60 * minutes
    while pending:
        if time.monotonic() >= deadline:
            for point in pending:
                yield Result(point, "not run", 0.0, [], f"{minutes:g} minutes were over")
            return
        group = pending if setting.fake else pending[:1]
        for result in run_group(group, setting, command, deadline, told):
            pending.remove(result.point)
            yield result


def run_group(
    group: list[Point],
    setting: Setting,
    command: Callable[[list[Point], Path], list[str]],
    deadline: float,
    told: Callable[[Point, float], None],
) -> Iterator[Result]:
    """Run points in one process, up to the first that crashes it."""
    events_file = setting.folder / f"{group[0].name}.jsonl"
    log_file = setting.folder / f"{group[0].name}.log"
    events_file.write_text("")
    waiting, rows, begun, unfinished = list(group), [], time.monotonic(), ""
    told(waiting[0], deadline - begun)
    with log_file.open("w") as log, events_file.open() as events:
        process = subprocess.Popen(
            command(group, events_file), stdout=log, stderr=log, start_new_session=True
        )
        try:
            while waiting:
                ended = process.poll() is not None
                for part in iter(events.readline, ""):
                    unfinished += part
                    if not unfinished.endswith("\n"):  # a long line is written in parts
                        continue
                    event, unfinished = json.loads(unfinished), ""
                    if "row" in event:
                        rows.append(event["row"])
                    elif "end" in event:
                        now = time.monotonic()
                        yield judged(waiting.pop(0), now - begun, rows, event["error"])
                        rows, begun = [], now
                        if waiting:
                            told(waiting[0], deadline - now)
                if not waiting:
                    break
                spent = time.monotonic() - begun
                limit = waiting[0].limit * (FAKE_PATIENCE if setting.fake else 1)
                limit = min(limit, max(deadline - begun, 0.0))
                if ended:
                    tail = "\n".join(log_file.read_text().splitlines()[-LOG_LINES:])
                    error = f"its process ended with exit status {process.returncode}\n{tail}"
                    yield Result(waiting[0], "failed", spent, rows, error)
                    return
                if spent > limit:
                    error = f"stopped after {limit:.0f} seconds"
                    yield Result(waiting[0], "cut", spent, rows, error)
                    return
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None and waiting:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def child_command(script: Path, setting: Setting) -> Callable[[list[Point], Path], list[str]]:
    """Return a function that makes the script's own command line, for :func:`child` to read."""

    def command(group: list[Point], events_file: Path) -> list[str]:
        where = [setting.device, str(setting.folder), str(events_file)]
        names = [point.name for point in group]
        return [sys.executable, "-W", "ignore", str(script), "--child", *where, *names]

    return command


def child(arguments: list[str], points: tuple[Point, ...]) -> None:
    """Run some points in this process. The arguments are device, folder, file of events, and names
    of points."""
    device, folder, events_file, *names = arguments
    by_name = {point.name: point for point in points}
    with Path(events_file).open("a", buffering=1) as file:

        def emit(event: Event) -> None:
            file.write(json.dumps(event) + "\n")

        check_all([by_name[name] for name in names], Setting(device, Path(folder)), emit)
