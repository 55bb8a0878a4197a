"""Parts of reports: tables in Markdown with notes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..outcomes import Outcome, count_missing
from ..summaries import Summary

Value = Any
"""A value that JSON can have, or a dataclass of such values."""
Show = Callable[[Any], str]
"""Function that formats a value as Markdown."""

FLOPS_NOTE = (
    "Training FLOPs: three forward passes, plus one more of the layers for the recomputation of "
    "activations, whether or not it is used. Selection counts three even where it has no gradient."
)


class Column(NamedTuple):
    """A column.

    Attributes:
        name: heading.
        show: format of the values; text is aligned to the left, all else to the right.
        value: function from an item, such as an outcome, to its value; ``None``: empty cell.
    """

    name: str
    show: Show
    value: Callable[[Any], Value]


@dataclass(frozen=True)
class Part:
    """A table with notes.

    Attributes:
        columns: heading -> format.
        rows: heading -> value; ``None`` or no value: empty cell.
        notes: sentences below.
        title: heading above.
    """

    columns: Mapping[str, Show]
    rows: Sequence[Mapping[str, Value]]
    notes: Sequence[str] = ()
    title: str = ""

    def markdown(self) -> str:
        """Return title, table and notes."""
        rule = ["---" if show in (text, markdown) else "---:" for show in self.columns.values()]
        body = [
            ["" if row.get(n) is None else show(row[n]) for n, show in self.columns.items()]
            for row in self.rows
        ]
        cells = [[text(name) for name in self.columns], rule, *body]
        table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        title = f"**{self.title}**" if self.title else ""
        return "\n\n".join(filter(None, [title, table, " ".join(self.notes)]))


Parts = dict[str, list[Part]]
"""Name of a block in documents -> its parts; ``""`` is the table itself."""


def make(columns: Sequence[Column], items: Iterable[Any], *notes: str, title: str = "") -> Part:
    """Make a part with a row for each item. Empty notes are left out."""
    rows = [{column.name: column.value(item) for column in columns} for item in items]
    formats = {column.name: column.show for column in columns}
    return Part(formats, rows, [*filter(None, notes)], title)


def entry(key: Any, item: tuple[str, Mapping[Any, Value]]) -> Value:
    """Return a value of an item that is a label and its values."""
    return item[1].get(key)


# Formats


def text(value: str) -> str:
    """Escape a text, on one line. Underscores within words need no escape."""
    value = " ".join(value.splitlines())
    for special in ("\\", "|", "*", "`", "<", "["):
        value = value.replace(special, "\\" + special)
    return value


def markdown(value: str) -> str:
    """Return Markdown as it is."""
    return value


whole = "{:,.0f}".format
plain = "{:g}".format


def summary(digits: int, unit: str = "") -> Show:
    """Return the format of mean ± standard deviation; the unit ``%`` is for shares."""
    scale = 100 if unit == "%" else 1

    def show(value: Summary) -> str:
        sd = "" if value.sd is None else f" ± {scale * value.sd:,.{digits}f}"
        return f"{scale * value.mean:,.{digits}f}{sd}{unit}"

    return show


# Notes


def runs_note(outcomes: Sequence[Outcome], mean: bool = True) -> str:
    """Say what the runs are: seeds, unless no mean is shown, missing runs, versions of the code."""
    counts = sorted({len(o.row.seeds) for o in outcomes})
    seeds = f"Mean ± standard deviation of {'up to ' * (len(counts) > 1)}{counts[-1]} seeds"
    notes = [seeds + ("; without ±, one seed." if len(counts) > 1 else ".")]
    notes = [] if not mean else ["One seed."] if counts == [1] else notes
    gone, total = count_missing(outcomes)
    notes += [f"{gone} of {total} runs are missing."] if gone else []
    if gone and any(0 < len(o.results) < len(o.runs) for o in outcomes):
        notes.append("A row with some of its seeds shows those.")
    for o in outcomes:
        if o.diverged:
            notes.append(f"{text(o.row.label)} diverged (seed {', '.join(map(str, o.diverged))}).")
    results = [result for o in outcomes for result in o.results.values()]
    return " ".join(filter(None, [*notes, versions_note(results)]))


def versions_note(results: Iterable[Mapping[str, Any]]) -> str:
    """Say with how many versions of the code the runs were trained, if with several."""
    count = len({result["versions"]["fairseq_sffn"] for result in results})
    return f"Trained with {count} versions of the code." if count > 1 else ""
