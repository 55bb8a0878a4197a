"""Draws the figures of tables, with matplotlib. A function returns ``None`` where there is nothing
to draw."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, PercentFormatter

from .files import REFERENCE, Table
from .frame import Experiments
from .tables.perplexity import flops_unit
from .tables.routing import LAYER, layers_of

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
"""Colors of Okabe and Ito, which the colour-blind can tell apart; another one replaces their
yellow."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
GREY = "#666666"
DPI = 150
LEAST_LOAD = 1 / 16
"""Smaller loads over the mean are not shown."""
STATISTICS = ["mean", "std"]


def style(i: int) -> dict[str, Any]:
    """Return colour and marker of the i-th curve."""
    marker = MARKERS[(i + i // len(COLORS)) % len(MARKERS)]
    return {"color": COLORS[i % len(COLORS)], "marker": marker, "markersize": 5, "linewidth": 1.5}


def line(i: int) -> dict[str, Any]:
    """Return colour and dashes of the i-th curve that has no markers."""
    dashes = LINES[(i + i // len(COLORS)) % len(LINES)]
    return {"color": COLORS[i % len(COLORS)], "linestyle": dashes, "linewidth": 1.5}


def new(width: float = 8.0, height: float = 4.5) -> Figure:
    """Make an empty figure, with its size in inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def finish(axes: Axes, x: str = "", y: str = "", title: str = "") -> None:
    """Label axes and draw their grid."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """Return a PNG without the time at which it is made."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def error_bars(axes: Axes, data: pd.DataFrame, name: str, x: str, y: str) -> None:
    """Draw a line through the means of each group, with standard deviations.

    Args:
        axes: where to draw.
        data: the runs.
        name, x, y: columns of the group, the position and the value.
    """
    for i, (label, group) in enumerate(data.groupby(name, sort=False)):
        points = group.groupby(x)[y].agg(STATISTICS)
        deviations = points["std"].fillna(0.0) if points["std"].notna().any() else None
        bars = {"label": label, "capsize": 3, **style(i)}
        axes.errorbar(points.index, points["mean"], yerr=deviations, **bars)


def logarithmic(
    axes: Axes,
    positions: pd.Series[float],
    base: float,
    show: Callable[[float], str] = "{:g}".format,
) -> None:
    """Make the horizontal axis logarithmic, with a tick at each position."""
    ticks = sorted(set(positions))
    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [show(x) for x in ticks])


def lines(experiments: Experiments, table: Table) -> Figure | None:
    """Draw test perplexity against ``x``: a line for each group, and a level for each other row."""
    runs = experiments.runs(table)
    on_axis = (runs.group != "") & runs.x.notna()
    points, levels = (runs[which & runs.test.notna()] for which in (on_axis, ~on_axis))
    if points.empty:
        return None
    figure = new()
    axes = figure.subplots()
    error_bars(axes, points, "group", "x", "test")
    logarithmic(axes, points.x, base=2)
    for i, label in enumerate(runs.label[~on_axis].unique()):
        if label in set(levels.label):
            mean = levels.test[levels.label == label].mean()
            axes.axhline(mean, color=GREY, linestyle=("--", ":", "-.")[i % 3], label=label)
    figure.legend(loc="outside right upper", frameon=False)
    finish(axes, table.axis, "test perplexity")
    return figure


def gap(experiments: Experiments, table: Table) -> Figure | None:
    """Draw the relative difference of each group's test perplexity to the reference group's, at the
    same ``x``, or at the same number of training tokens where a row has no ``x``."""
    runs = experiments.runs(table)
    runs = runs[(runs.group != "") & runs.test.notna()]
    runs = runs.assign(where=runs.x.fillna(runs.tokens))
    others, base = runs[runs.group != REFERENCE], runs[runs.group == REFERENCE]
    pairs = others.merge(base[["where", "seed", "test"]], on=["where", "seed"])
    if pairs.empty:
        return None
    figure = new()
    axes = figure.subplots()
    error_bars(axes, pairs.assign(gap=pairs.test_x / pairs.test_y - 1), "group", "where", "gap")
    logarithmic(axes, pairs["where"], base=10, show=short)
    axes.axhline(0, color=GREY, linestyle="--", label=REFERENCE)
    axes.yaxis.set_major_formatter("{x:+.0%}")
    figure.legend(loc="outside right upper", frameon=False)
    finish(axes, table.axis or "training tokens", "test perplexity, against dense")
    return figure


def short(value: float) -> str:
    """Format a number with a suffix for thousands, millions or billions."""
    sizes = ((1e9, "B"), (1e6, "M"), (1e3, "k"), (0, ""))
    size, suffix = next(one for one in sizes if value >= one[0])
    return f"{value / (size or 1):.3g}{suffix}" if size else f"{value:g}"


def flops(experiments: Experiments, table: Table) -> Figure | None:
    """Draw test perplexity against training FLOPs."""
    runs = experiments.runs(table)
    runs = runs[runs.test.notna()]
    if runs.empty:
        return None
    unit, name = flops_unit(runs.flops.max())
    figure = new()
    axes = figure.subplots()
    error_bars(axes, runs.assign(compute=runs.flops / unit), "label", "compute", "test")
    axes.margins(0.12)
    figure.legend(loc="outside right upper", frameon=False)
    finish(axes, name, "test perplexity")
    return figure


def load(experiments: Experiments, table: Table) -> Figure | None:
    """Draw the load of blocks during training: a column for each group of rows."""
    runs = experiments.runs(table)
    runs = runs[[bool(result.get("routing")) for result in runs.result]]
    if runs.empty:
        return None
    groups = runs.groupby("group", sort=False)
    figure = new(max(6.0, 4.2 * len(groups)), 7.0)
    panels = figure.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
    for (loads, used), (name, rows) in zip(panels.T, groups, strict=True):
        for i, (label, row) in enumerate(rows.groupby("label", sort=False)):
            log = pd.DataFrame([r for result in row.result for r in result["training"]["train"]])
            means = log.groupby("update").mean()
            memories = row.model.iloc[0].memories.values()
            blocks = sum(memory.routed_blocks for memory in memories) / len(memories)
            loads.plot(means.load_max.dropna(), **line(i))
            used.plot(1 - means.unused_blocks.dropna() / blocks, label=label, **line(i))
        finish(loads, title=name)
        finish(used, "updates")
        used.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    loads, used = panels[:, 0]
    loads.set_ylabel("most loaded block / mean")
    loads.set_yscale("log", base=2)
    loads.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    loads.yaxis.set_major_formatter("{x:g}")
    loads.set_ylim(bottom=1)
    used.set_ylabel("used blocks")
    used.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    return figure


def routing(experiments: Experiments, table: Table) -> Figure | None:
    """Draw the blocks of each layer by load, and the token dependence of each row and layer."""
    found = layers_of(experiments.runs(table))
    if found.empty:
        return None
    labels, layers = list(found.label.unique()), list(found.layer.unique())
    figure = new(3.6 * (len(layers) + 1), 4.2)
    *loads, bars = figure.subplots(1, len(layers) + 1)
    named: set[str] = set()
    for row in found.drop_duplicates(LAYER).itertuples():
        counts = pd.Series(row.counts).sort_values(ascending=False) / (
            sum(row.counts) / len(row.counts)
        )
        loads[layers.index(row.layer)].step(
            [i / len(counts) for i in range(len(counts) + 1)],
            [*counts, counts.iloc[-1]],
            where="post",
            label=None if row.label in named else row.label,
            **line(labels.index(row.label)),
        )
        named.add(row.label)
    for axes, layer in zip(loads, layers, strict=True):
        axes.set_yscale("log", base=2, nonpositive="clip")
        axes.set_ylim(bottom=LEAST_LOAD)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
        finish(axes, "blocks, most loaded first", "load / mean", f"layer {layer}")
    width = 0.8 / len(labels)
    shares = found.astype({"dependence": float}).groupby(LAYER).dependence.agg(STATISTICS)
    for (label, layer), share in shares[shares["mean"].notna()].iterrows():
        i = labels.index(label)
        x = layers.index(layer) + (i - (len(labels) - 1) / 2) * width
        bars.bar(x, share["mean"], width, yerr=share["std"], color=COLORS[i % len(COLORS)])
    bars.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    bars.set_ylim(0, 1.05)
    finish(bars, y="mutual information / maximum", title="token dependence")
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure


def bars(experiments: Experiments, table: Table) -> Figure | None:
    """Draw the test perplexity of each row, the lowest first: seeds, mean and standard deviation,
    in the colour of the row's group."""
    runs = experiments.runs(table)
    groups = [group for group in runs.group.unique() if group]
    colors = dict(zip(groups, COLORS, strict=False))
    runs = runs[runs.test.notna()]
    if runs.empty:
        return None
    rows = runs.groupby("label", sort=False).test.agg(STATISTICS).sort_values("mean")
    figure = new(8.0, 1.2 + 0.34 * len(rows))
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
    finish(axes, "test perplexity (dots: seeds; bars: standard deviation; dashed: dense)")
    return figure


FIGURES: dict[str, Callable[[Experiments, Table], Figure | None]] = {
    **{"lines": lines, "flops": flops, "load": load, "gap": gap, "routing": routing, "bars": bars}
}
"""Kind of a figure -> the function that draws it."""
