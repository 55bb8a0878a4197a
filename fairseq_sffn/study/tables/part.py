"""What stands in one place of a document: a table in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..statistics import Summary

Value = Any
"""What JSON can have, or a dataclass of such."""
Show = Callable[[Any], str]


@dataclass(frozen=True)
class Part:
    """What stands in one place of a document.

    Attributes:
        columns: heading -> how its values are written.
        rows: heading -> value; ``None``, or no value: an empty cell.
        notes: sentences below.
        title: above.
    """

    columns: Mapping[str, Show]
    rows: Sequence[Mapping[str, Value]]
    notes: Sequence[str] = field(default=())
    title: str = ""

    def markdown(self) -> str:
        """Title, table and notes."""
        head = list(map(text, self.columns))
        rule = ["---" if show in (text, markdown) else "---:" for show in self.columns.values()]
        body = [
            [
                "" if row.get(name) is None else show(row[name])
                for name, show in self.columns.items()
            ]
            for row in self.rows
        ]
        lines = "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])
        title = f"**{self.title}**" if self.title else ""
        return "\n\n".join(filter(None, [title, lines, " ".join(self.notes)]))


Parts = dict[str, list[Part]]
"""What a table consists of, by the names of its blocks in documents; ``""`` is the table itself."""


def render(parts: Sequence[Part]) -> str:
    """All parts of a block."""
    return "\n\n".join(part.markdown() for part in parts)


# How values are written


def text(value: str) -> str:
    """A word that is no Markdown by accident, on one line. Underscores within words are none."""
    value = " ".join(value.splitlines())
    for special in ("\\", "|", "*", "`", "<", "["):
        value = value.replace(special, "\\" + special)
    return value


def markdown(value: str) -> str:
    """Words that are Markdown already."""
    return value


def code(value: str) -> str:
    """A word as code, whatever it has in it."""
    fence = "``" if "`" in value else "`"
    pad = " " if "`" in value else ""
    return f"{fence}{pad}{value}{pad}{fence}".replace("|", "\\|")


def whole(value: float) -> str:
    """A count."""
    return f"{value:,.0f}"


def millions(value: float) -> str:
    """A count of parameters."""
    return f"{value / 1e6:,.2f}M"


def percent(value: float) -> str:
    """A share, with its sign."""
    return f"{value:+.2%}"


def plain(value: float) -> str:
    """A number that was typed by a person."""
    return f"{value:g}"


def summary(digits: int, unit: str = "") -> Show:
    """Mean ± standard deviation, or the mean where there is no deviation; with ``unit="%"``, of
    shares."""
    scale = 100 if unit == "%" else 1

    def show(value: Summary) -> str:
        sd = "" if value.sd is None else f" ± {scale * value.sd:,.{digits}f}"
        return f"{scale * value.mean:,.{digits}f}{sd}{unit}"

    return show
