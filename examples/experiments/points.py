"""The data that figures show. An empty collection means that there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Sized

from .files import REFERENCE, Row, Scale, Table
from .outcomes import Experiments, Outcome
from .summaries import Summary, summarize

Points = dict[str, list[tuple[float, Summary]]]
"""Group -> positions of its rows on the axis, and their values."""


def position(row: Row, scale: Scale) -> float | None:
    """Return the position of a row on the axis."""
    value = str(row.x).replace("{ffn}", str(scale.ffn_embed_dim))
    return float(value) if value else None


def line_points(experiments: Experiments, table: Table) -> Points:
    """Return the test perplexity of each group against ``x``."""
    found: Points = {}
    for o in experiments.outcomes(table):
        x, ppl = position(o.row, experiments.scale), summarize(o.perplexity("test").values())
        if o.row.group and x is not None and ppl is not None:
            found.setdefault(o.row.group, []).append((x, ppl))
    return found


def gap_points(experiments: Experiments, table: Table) -> Points:
    """Return the relative difference of each group's test perplexity to the reference group's, at
    the same ``x``, or at the same number of training tokens where a row has no ``x``."""

    def where(o: Outcome) -> float:
        x = position(o.row, experiments.scale)
        return float(experiments.tokens(o.row)) if x is None else x

    outcomes = [o for o in experiments.outcomes(table) if o.row.group]
    reference = {where(o): o.perplexity("test") for o in outcomes if o.row.group == REFERENCE}
    found: Points = {}
    for o in outcomes:
        base, own = reference.get(where(o), {}), o.perplexity("test")
        ratio = summarize(own[seed] / base[seed] - 1 for seed in own if seed in base)
        if ratio and o.row.group != REFERENCE:
            found.setdefault(o.row.group, []).append((where(o), ratio))
    return found


def tested(experiments: Experiments, table: Table) -> list[Outcome]:
    """Return the rows whose test perplexity is known."""
    return [o for o in experiments.outcomes(table) if o.perplexity("test")]


def routed(experiments: Experiments, table: Table) -> list[Outcome]:
    """Return the rows whose routing is known."""
    return [o for o in experiments.outcomes(table) if o.layers]


POINTS: dict[str, Callable[[Experiments, Table], Sized]] = {
    "lines": line_points,
    "gap": gap_points,
    **dict.fromkeys(("flops", "bars"), tested),
    **dict.fromkeys(("load", "routing"), routed),
}
"""Kind of a figure -> its data."""
