"""The points of the validation, and the rows that they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Setting(NamedTuple):
    """The setting of a run.

    Attributes:
        device: ``cuda``, or ``cpu`` for ``--fake``.
        folder: folder for the files that a point makes.
    """

    device: str
    folder: Path

    @property
    def fake(self) -> bool:
        """Whether to use small sizes, which a CPU computes in seconds."""
        return self.device == "cpu"


class Point(NamedTuple):
    """One of the ten checks, or a part of one.

    Attributes:
        name: name for ``--only`` and the results.
        number: number in the list of the kit.
        title: what it checks.
        check: function that yields a row for each checked thing, as soon as it is known.
        limit: seconds after which the point is stopped.
        on_cpu, on_cuda: whether ``--fake`` runs it, and whether a run on a GPU does.
    """

    name: str
    number: int
    title: str
    check: Callable[[Setting], Iterator[Row]]
    limit: int
    on_cpu: bool = True
    on_cuda: bool = True


def bounded(what: str, value: float, limit: float, **more: Any) -> Row:
    """Return a row that passes if a number is finite and at most ``limit``."""
    passed = math.isfinite(value) and value <= limit
    # JSON has no infinite numbers.
    shown = value if math.isfinite(value) else str(value)
    return {"what": what, "value": shown, "limit": limit, "passed": passed, **more}


def told(what: str, **more: Any) -> Row:
    """Return a row that is recorded and neither passes nor fails."""
    return {"what": what, "passed": None, **more}


def asserted(what: str, passed: bool, **more: Any) -> Row:
    """Return a row that passes or fails."""
    return {"what": what, "passed": bool(passed), **more}


def tried(what: str, run: Callable[[], Row]) -> Row:
    """Return the row that ``run`` gives, or a failed row with the error."""
    try:
        return run()
    except (Exception, SystemExit) as error:  # SystemExit: a command refused its arguments
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return asserted(what, False, error=message)
