"""Draws the figures of tables, with matplotlib."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, PercentFormatter

from .files import REFERENCE, Table
from .frame import Experiments
from .tables.part import short
from .tables.perplexity import flops_unit
from .tables.routing import LAYER, layers_of
from .trends import Trend, gaps, trends

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
"""Colors of Okabe and Ito, which the colour-blind can tell apart; another one replaces their
yellow."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
GREY = "#666666"
THEME: Any = {
    **{"figure.dpi": 150, "figure.constrained_layout.use": True, "legend.frameon": False},
    **{"axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.6, "axes.titlesize": 10},
    **{"axes.spines.top": False, "axes.spines.right": False},
    **{"lines.linewidth": 1.5, "lines.markersize": 5, "errorbar.capsize": 3},
}
"""Settings of matplotlib."""
LEAST_LOAD = 1 / 16
"""Smaller loads over the mean are not shown."""
STATISTICS = ["mean", "std"]


def style(i: int, name: str = "linestyle", of: tuple[str, ...] = LINES) -> dict[str, Any]:
    """Return the colour of the i-th curve, and its dashes or markers."""
    return {"color": COLORS[i % len(COLORS)], name: of[(i + i // len(COLORS)) % len(of)]}


def draw(experiments: Experiments, table: Table) -> Figure | None:
    """Draw the figure of a table. ``None`` where there is nothing to draw."""
    runs = experiments.runs(table)
    runs = runs[runs.test.notna()]
    with matplotlib.rc_context(THEME):
        figure = None if runs.empty else FIGURES[table.figure](runs, table)
        if figure is not None and (fits := trends(experiments, table)):
            bands(figure.axes[0], runs, fits, table.trend_from or 0.0)
        return figure


def png(figure: Figure) -> bytes:
    """Return a PNG without the time at which it is made."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def curves(
    runs: pd.DataFrame, name: str, x: str, y: str, levels: dict[str, float], **labels: str
) -> tuple[Figure, Axes]:
    """Draw a line through the means of each group, with standard deviations.

    Args:
        runs: the runs.
        name, x, y: columns of the group, the position and the value.
        levels: horizontal lines, by name.
        labels: labels of the axes.
    """
    figure = Figure(figsize=(8.0, 4.5))
    axes = figure.subplots()
    for i, (label, group) in enumerate(runs.groupby(name, sort=False)):
        points = group.groupby(x)[y].agg(STATISTICS)
        deviations = points["std"].fillna(0.0) if points["std"].notna().any() else None
        marks = style(i, "marker", MARKERS)
        axes.errorbar(points.index, points["mean"], yerr=deviations, label=label, **marks)
    for i, (label, level) in enumerate(levels.items()):
        axes.axhline(level, color=GREY, linestyle=LINES[1:][i % 3], label=label)
    axes.set(**labels)
    figure.legend(loc="outside right upper")
    return figure, axes


def logarithmic(axes: Axes, positions: pd.Series, base: float, show: Any) -> None:
    """Make the horizontal axis logarithmic, with a tick at each position."""
    ticks = sorted(set(positions))
    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [show(x) for x in ticks])


def lines(runs: pd.DataFrame, table: Table) -> Figure | None:
    """Draw test perplexity against ``x``: a line for each group, and a level for each other row."""
    on_axis = (runs.group != "") & runs.x.notna()
    levels = runs[~on_axis].groupby("label", sort=False).test.mean().to_dict()
    if not on_axis.any():
        return None
    labels = {"xlabel": table.axis, "ylabel": "test perplexity"}
    figure, axes = curves(runs[on_axis], "group", "x", "test", levels, **labels)
    logarithmic(axes, runs.x[on_axis], 2, "{:g}".format)
    return figure


def gap(runs: pd.DataFrame, table: Table) -> Figure | None:
    """Draw the relative difference of each group's test perplexity to the reference group's, at the
    same position; see :func:`gaps`."""
    pairs = gaps(runs)
    if pairs.empty:
        return None
    pairs = pairs.assign(gap=np.expm1(pairs.gap))
    labels = {"xlabel": table.axis or "training tokens", "ylabel": "test perplexity, against dense"}
    figure, axes = curves(pairs, "group", "where", "gap", {REFERENCE: 0}, **labels)
    logarithmic(axes, pairs["where"], 10, short)
    axes.yaxis.set_major_formatter("{x:+.0%}")
    return figure


def bands(axes: Axes, runs: pd.DataFrame, fits: Sequence[Trend], start: float) -> None:
    """Add trends and their 95% intervals to a figure of gaps, up to twice the last position."""
    pairs = gaps(runs)
    groups = list(pairs.group.unique())
    positions = np.geomspace(start, 2 * pairs["where"].max(), 50)
    for fit in fits:
        middle, low, high = np.expm1([fit.at(x) for x in positions]).T
        color = style(groups.index(fit.group))["color"]
        axes.plot(positions, middle, color=color, linestyle=":", linewidth=1)
        axes.fill_between(positions, low, high, color=color, alpha=0.15, linewidth=0)


def flops(runs: pd.DataFrame, table: Table) -> Figure:
    """Draw test perplexity against training FLOPs."""
    unit, name = flops_unit(runs.flops.max())
    runs = runs.assign(compute=runs.flops / unit)
    labels = {"xlabel": name, "ylabel": "test perplexity"}
    figure, axes = curves(runs, "label", "compute", "test", {}, **labels)
    axes.margins(0.12)
    return figure


def load(runs: pd.DataFrame, table: Table) -> Figure | None:
    """Draw the load of blocks during training: a column for each group of rows."""
    runs = runs[[bool(result["routing"]) for result in runs.result]]
    if runs.empty:
        return None
    groups = runs.groupby("group", sort=False)
    figure = Figure(figsize=(max(6.0, 4.2 * len(groups)), 7.0))
    panels = figure.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
    for (loads, used), (name, rows) in zip(panels.T, groups, strict=True):
        for i, (label, row) in enumerate(rows.groupby("label", sort=False)):
            log = pd.DataFrame([r for result in row.result for r in result["training"]["train"]])
            means = log.groupby("update").mean()
            memories = row.model.iloc[0].memories.values()
            blocks = sum(memory.routed_blocks for memory in memories) / len(memories)
            loads.plot(means.load_max.dropna(), **style(i))
            used.plot(1 - means.unused_blocks.dropna() / blocks, label=label, **style(i))
        loads.set_title(name)
        used.set_xlabel("updates")
        used.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    loads, used = panels[:, 0]
    loads.set_yscale("log", base=2)
    loads.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    loads.yaxis.set_major_formatter("{x:g}")
    loads.set(ylabel="most loaded block / mean", ylim=(1, None))
    used.set_ylabel("used blocks")
    used.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    return figure


def routing(runs: pd.DataFrame, table: Table) -> Figure | None:
    """Draw the blocks of each layer by load, and the token dependence of each row and layer."""
    found = layers_of(runs)
    if found.empty:
        return None
    rows, layers = list(found.label.unique()), list(found.layer.unique())
    figure = Figure(figsize=(3.6 * (len(layers) + 1), 4.2))
    *loads, bars = figure.subplots(1, len(layers) + 1)
    first = found.drop_duplicates(LAYER)
    for layer, named in zip(first.itertuples(), ~first.label.duplicated(), strict=True):
        counts = pd.Series(layer.counts).sort_values(ascending=False)
        label = layer.label if named else None
        positions, loads_of = np.linspace(0, 1, len(counts) + 1), counts / counts.mean()
        curve = style(rows.index(layer.label)) | {"label": label, "where": "post"}
        loads[layers.index(layer.layer)].step(positions, [*loads_of, loads_of.iloc[-1]], **curve)
    for axes, layer in zip(loads, layers, strict=True):
        axes.set_yscale("log", base=2, nonpositive="clip")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
        labels = {"xlabel": "blocks, most loaded first", "ylabel": "load / mean"}
        axes.set(**labels, title=f"layer {layer}", ylim=(LEAST_LOAD, None))
    width = 0.8 / len(rows)
    shares = found.astype({"dependence": float}).groupby(LAYER).dependence.agg(STATISTICS)
    for (label, layer), share in shares[shares["mean"].notna()].iterrows():
        i = rows.index(label)
        x = layers.index(layer) + (i - (len(rows) - 1) / 2) * width
        color = COLORS[i % len(COLORS)]
        bars.bar(x, share["mean"], width, yerr=share["std"], color=color, capsize=0)
    bars.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    bars.set(ylabel="mutual information / maximum", title="token dependence", ylim=(0, 1.05))
    figure.legend(loc="outside lower center", ncols=6)
    return figure


def bars(runs: pd.DataFrame, table: Table) -> Figure:
    """Draw the test perplexity of each row, the lowest first: seeds, mean and standard deviation,
    in the colour of the row's group."""
    groups = dict.fromkeys(row.group for row in table.rows if row.group)
    colors = dict(zip(groups, COLORS, strict=False))
    rows = runs.groupby("label", sort=False).test.agg(STATISTICS).sort_values("mean")
    figure = Figure(figsize=(8.0, 1.2 + 0.34 * len(rows)))
    axes = figure.subplots()
    dots: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 4}
    for i, (label, row) in enumerate(rows.iterrows()):
        of_row = runs[runs.label == label]
        color = colors.get(of_row.group.iloc[0], COLORS[6])
        error = row["std"] if len(of_row) > 1 else None
        axes.errorbar(row["mean"], i, xerr=error, fmt="|", color=color, capsize=4, markersize=14)
        if len(of_row) > 1:
            axes.plot(of_row.test, [i] * len(of_row), color=color, **dots)
        if of_row.run.iloc[0].model == "dense":
            axes.axvline(row["mean"], color=GREY, linestyle="--", linewidth=1, zorder=0)
    for name, color in colors.items():
        axes.plot([], [], color=color, label=name, **dots)
    if colors:
        axes.legend(frameon=False, fontsize=9)
    axes.set_yticks(range(len(rows)), list(rows.index))
    axes.invert_yaxis()
    axes.set_xlabel("test perplexity (dots: seeds; bars: standard deviation; dashed: dense)")
    return figure


FIGURES: dict[str, Callable[[pd.DataFrame, Table], Figure | None]] = {
    **{"lines": lines, "flops": flops, "load": load, "gap": gap, "routing": routing, "bars": bars}
}
"""Kind of a figure -> the function that draws it."""
