"""Documents with blocks between marker lines, which a report fills in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import UsageError

START = re.compile(r"<!-- report: (\S+) -->")
END = "<!-- end -->"


def fill(path: Path, block: Callable[[str], str]) -> str:
    """A document with its blocks replaced.

    Args:
        path: of the document.
        block: name of a block -> what should be in it.

    Raises:
        UsageError: the document cannot be read, or a marker has no other end.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    return "\n".join(_filled(path, lines, block)) + "\n"


def _filled(path: Path, lines: list[str], block: Callable[[str], str]) -> Iterable[str]:
    opened = None
    for number, line in enumerate(lines, 1):
        start = START.fullmatch(line.strip())
        if start and opened:
            raise UsageError(f"{path}:{opened}: this block has no {END}")
        if start:
            opened = number
            filling = block(start[1])
            yield from (line, "", *([filling, ""] if filling else []))
        elif line.strip() == END:
            if not opened:
                raise UsageError(f"{path}:{number}: {END} ends no block")
            opened = None
        if not opened:
            yield line
    if opened:
        raise UsageError(f"{path}:{opened}: this block has no {END}")
