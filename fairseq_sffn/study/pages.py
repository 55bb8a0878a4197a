"""Documents with blocks between marker lines, which a report fills in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import UsageError

START = re.compile(r"<!-- report: (\S+) -->")
END = "<!-- end -->"


def read(path: Path) -> str:
    """A document, with the line ends that it has.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error


def fill(path: Path, block: Callable[[str], str]) -> str:
    """A document with its blocks replaced.

    Args:
        path: of the document.
        block: name of a block -> what should be in it.

    Raises:
        UsageError: the document cannot be read, has no block, or a marker has no other end.
    """
    lines = read(path).splitlines(keepends=True)
    if not any(START.fullmatch(line.strip()) or line.strip() == END for line in lines):
        raise UsageError(f"{path}: has no block <!-- report: BLOCK -->")
    return "".join(_filled(path, lines, block))


def _filled(path: Path, lines: list[str], block: Callable[[str], str]) -> Iterable[str]:
    opened = None
    for number, line in enumerate(lines, 1):
        start = START.fullmatch(line.strip())
        if start and opened:
            raise UsageError(f"{path}:{opened}: this block has no {END}")
        if start:
            opened = number
            filling = block(start[1])
            inside = ["", *([*filling.split("\n"), ""] if filling else [])]
            yield line
            yield from (text + _end(line) for text in inside)
        elif line.strip() == END:
            if not opened:
                raise UsageError(f"{path}:{number}: {END} ends no block")
            opened = None
        if not opened:
            yield line
    if opened:
        raise UsageError(f"{path}:{opened}: this block has no {END}")


def _end(line: str) -> str:
    """What ends a line."""
    return line[len(line.rstrip("\r\n")) :]
