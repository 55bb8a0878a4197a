"""Fills the blocks of documents between marker lines with parts of reports."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from fairseq_sffn.errors import UsageError

MARKER = re.compile(r"<!-- (?:report: (\S+)|(end)) -->")


def read(path: Path) -> str:
    """Read a document without changing its line ends."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error


def fill(path: Path, block: Callable[[str], str]) -> str:
    """Return a document with filled blocks, from ``<!-- report: BLOCK -->`` to ``<!-- end -->``.

    Args:
        path: file of the document.
        block: function from the name of a block to its text.
    """
    filled, opened, found = [], 0, False
    for number, line in enumerate(read(path).splitlines(keepends=True), 1):
        marker = MARKER.fullmatch(line.strip())
        found = found or marker is not None
        if marker and marker[1]:
            if opened:
                break
            opened, text = number, block(marker[1])
            line_end = line[len(line.rstrip("\r\n")) :]
            inside = ["", *([*text.split("\n"), ""] if text else [])]
            filled += [line, *(one + line_end for one in inside)]
        elif marker:
            if not opened:
                raise UsageError(f"{path}:{number}: <!-- end --> ends no block")
            opened = 0
        if not opened:
            filled.append(line)
    if opened:
        raise UsageError(f"{path}:{opened}: this block has no <!-- end -->")
    if not found:
        raise UsageError(f"{path}: has no block <!-- report: BLOCK -->")
    return "".join(filled)
