"""Parts of reports: tables in Markdown with notes."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pandas as pd

FLOPS_NOTE = (
    "Training FLOPs: three forward passes, plus one more of the layers for the recomputation of "
    "activations, whether or not it is used. Selection counts three even where it has no gradient."
)


class Part:
    """A table with notes.

    Args:
        cells: heading -> Markdown of the cells below.
        notes: sentences below the table; empty ones are left out.
        title: heading above.
        left: columns that are aligned to the left.
    """

    def __init__(
        self,
        cells: Mapping[str, Iterable[str]] | pd.DataFrame,
        notes: Iterable[str],
        title: str = "",
        left: Collection[str] = ("model",),
    ) -> None:
        self.cells = pd.DataFrame({name: [*values] for name, values in cells.items()})
        self.notes, self.title, self.left = [*filter(None, notes)], title, left

    def markdown(self) -> str:
        """Return title, table and notes; nothing for a table without lines."""
        if self.cells.empty:
            return ""
        rule = ["---" if name in self.left else "---:" for name in self.cells]
        lines = [map(text, self.cells), rule, *self.cells.itertuples(index=False)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        title = f"**{self.title}**" if self.title else ""
        return "\n\n".join(filter(None, [title, table, " ".join(self.notes)]))


Parts = dict[str, list[Part]]
"""Name of a block in documents -> its parts; ``""`` is the table itself."""


def text(value: str) -> str:
    """Escape a text, on one line. Underscores within words need no escape."""
    value = " ".join(value.splitlines())
    for special in ("\\", "|", "*", "`", "<", "["):
        value = value.replace(special, "\\" + special)
    return value


def shown(values: Iterable[Any], show: Callable[[Any], str]) -> list[str]:
    """Format values; an unknown one gives an empty cell."""
    return ["" if pd.isna(value) else show(value) for value in values]


def short(value: float) -> str:
    """Format a number with a suffix for thousands, millions or billions."""
    sizes = ((1e9, "B"), (1e6, "M"), (1e3, "k"), (0, ""))
    size, suffix = next(one for one in sizes if value >= one[0])
    return f"{value / (size or 1):.3g}{suffix}" if size else f"{value:g}"


def mean_sd(values: Iterable[float | None], digits: int = 2, unit: str = "") -> str:
    """Format mean ± standard deviation of the known values; the unit ``%`` is for shares."""
    known = pd.Series([*values], dtype=float).dropna() * (100 if unit else 1)
    figures = [known.mean(), known.std()][: len(known)]
    return " ± ".join(f"{figure:,.{digits}f}" for figure in figures) + unit * bool(figures)


def means(
    frame: pd.DataFrame, column: str, digits: int = 2, unit: str = "", by: Any = "label"
) -> list[str]:
    """Format a column of a data frame, one mean for each row of a table."""
    return [mean_sd(found, digits, unit) for _, found in frame.groupby(by, sort=False)[column]]


def runs_note(runs: pd.DataFrame, mean: bool = True) -> str:
    """Say what the runs are: seeds, unless no mean is shown, missing runs, versions of the code."""
    rows = runs.groupby("label", sort=False)
    counts = sorted(set(rows.size()))
    seeds = f"Mean ± standard deviation of {'up to ' * (len(counts) > 1)}{counts[-1]} seeds"
    notes = [seeds + ("; without ±, one seed." if len(counts) > 1 else ".")]
    notes = [] if not mean else ["One seed."] if counts == [1] else notes
    each_once = runs.drop_duplicates("run")
    if not each_once.done.all():
        notes.append(f"{(~each_once.done).sum()} of {len(each_once)} runs are missing.")
        if (rows.done.any() & ~rows.done.all()).any():
            notes.append("A row with some of its seeds shows those.")
    for label, diverged in runs[runs.diverged].groupby("label", sort=False).seed:
        notes.append(f"{text(label)} diverged (seed {', '.join(map(str, diverged))}).")
    return " ".join(filter(None, [*notes, versions_note(runs)]))


def versions_note(runs: pd.DataFrame) -> str:
    """Say with how many versions of the code the runs were trained, if with several. Early results
    have no fingerprint of the code, but a commit."""
    versions = [result["versions"] for result in runs.result[runs.done]]
    count = len({found.get("code", found["fairseq_sffn"]) for found in versions})
    return f"Trained with {count} versions of the code." if count > 1 else ""
