"""Draws the figures of tables, with matplotlib."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, PercentFormatter

from .files import REFERENCE, Table
from .outcomes import Experiments, Outcome
from .points import Points, gap_points, line_points, routed, tested
from .summaries import summarize
from .tables.part import Show, plain
from .tables.perplexity import flops_unit
from .tables.routing import dependence

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
"""Colors of Okabe and Ito, which the colour-blind can tell apart; another one replaces their
yellow."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
GREY = "#666666"
DPI = 150
LEAST_LOAD = 1 / 16
"""Smaller loads over the mean are not shown."""


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


def error_bars(axes: Axes, points: Points, base: float = 0.0, show: Show = plain) -> None:
    """Draw a line through the means of each group, with standard deviations.

    Args:
        axes: where to draw.
        points: points of each group.
        base: base of a logarithmic horizontal axis with a tick at each point; 0: linear.
        show: format of the ticks.
    """
    for i, (name, group) in enumerate(points.items()):
        xs, found = zip(*sorted(group, key=lambda point: point[0]), strict=True)
        several = any(summary.sd is not None for summary in found)
        deviations = [summary.sd or 0.0 for summary in found] if several else None
        means = [summary.mean for summary in found]
        axes.errorbar(xs, means, yerr=deviations, label=name, capsize=3, **style(i))
    if base:
        ticks = sorted({x for group in points.values() for x, _ in group})
        axes.set_xscale("log", base=base)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [show(x) for x in ticks])


def lines(experiments: Experiments, table: Table) -> Figure:
    """Draw test perplexity against ``x``: a line for each group, and a level for each other row."""
    figure = new()
    axes = figure.subplots()
    error_bars(axes, line_points(experiments, table), base=2)
    levels = [o for o in experiments.outcomes(table) if not o.row.group or o.row.x == ""]
    for i, o in enumerate(levels):
        if found := summarize(o.perplexity("test").values()):
            dashes = ("--", ":", "-.")[i % 3]
            axes.axhline(found.mean, color=GREY, linestyle=dashes, label=o.row.label)
    figure.legend(loc="outside right upper", frameon=False)
    finish(axes, table.axis, "test perplexity")
    return figure


def gap(experiments: Experiments, table: Table) -> Figure:
    """Draw the relative difference of each group's perplexity to the reference group's."""
    figure = new()
    axes = figure.subplots()
    error_bars(axes, gap_points(experiments, table), base=10, show=short)
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


def flops(experiments: Experiments, table: Table) -> Figure:
    """Draw test perplexity against training FLOPs."""
    outcomes = tested(experiments, table)
    unit, name = flops_unit(max(map(experiments.training_flops, outcomes)))
    points: Points = {}
    for o in outcomes:
        if summary := summarize(o.perplexity("test").values()):
            points[o.row.label] = [(experiments.training_flops(o) / unit, summary)]
    figure = new()
    axes = figure.subplots()
    error_bars(axes, points)
    axes.margins(0.12)
    figure.legend(loc="outside right upper", frameon=False)
    finish(axes, name, "test perplexity")
    return figure


def curve(outcome: Outcome, name: str) -> tuple[list[float], list[float]]:
    """Return updates, and a value of the training log at each, averaged over seeds."""
    values: dict[float, list[float]] = {}
    for result in outcome.good.values():
        for record in result["training"]["train"]:
            if name in record:
                values.setdefault(record["update"], []).append(record[name])
    updates = sorted(values)
    return updates, [statistics.fmean(values[update]) for update in updates]


def load(experiments: Experiments, table: Table) -> Figure:
    """Draw the load of blocks during training: a column for each group of rows."""
    by_group: dict[str, list[Outcome]] = {}
    for o in routed(experiments, table):
        by_group.setdefault(o.row.group, []).append(o)
    figure = new(max(6.0, 4.2 * len(by_group)), 7.0)
    panels = figure.subplots(2, len(by_group), sharex=True, sharey="row", squeeze=False)
    for (loads, used), (name, rows) in zip(panels.T, by_group.items(), strict=True):
        for i, o in enumerate(rows):
            loads.plot(*curve(o, "load_max"), **line(i))
            updates, unused = curve(o, "unused_blocks")
            blocks = statistics.mean(
                memory.routed_blocks for memory in experiments.memories(o).values()
            )
            share = [1 - without / blocks for without in unused]
            used.plot(updates, share, label=o.row.label, **line(i))
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


def routing(experiments: Experiments, table: Table) -> Figure:
    """Draw the blocks of each layer by load, and the token dependence of each row and layer."""
    outcomes = routed(experiments, table)
    layers = list(dict.fromkeys(layer for o in outcomes for layer in o.layers))
    figure = new(3.6 * (len(layers) + 1), 4.2)
    *loads, bars = figure.subplots(1, len(layers) + 1)
    for axes, layer in zip(loads, layers, strict=True):
        for i, o in enumerate(outcomes):
            if layer not in o.layers:
                continue
            counts = sorted(o.first["routing"][layer]["counts"], reverse=True)
            mean = sum(counts) / len(counts)
            axes.step(
                [j / len(counts) for j in range(len(counts) + 1)],
                [count / mean for count in [*counts, counts[-1]]],
                where="post",
                label=o.row.label if layer == o.layers[0] else None,
                **line(i),
            )
        axes.set_yscale("log", base=2, nonpositive="clip")
        axes.set_ylim(bottom=LEAST_LOAD)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
        finish(axes, "blocks, most loaded first", "load / mean", f"layer {layer}")
    width = 0.8 / len(outcomes)
    for i, o in enumerate(outcomes):
        for j, layer in enumerate(layers):
            if layer not in o.layers:
                continue
            found = [r["routing"][layer] for r in o.good.values() if layer in r["routing"]]
            if summary := dependence(found, experiments.memories(o)[layer]):
                x = j + (i - (len(outcomes) - 1) / 2) * width
                bars.bar(x, summary.mean, width, yerr=summary.sd, color=COLORS[i % len(COLORS)])
    bars.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    bars.set_ylim(0, 1.05)
    finish(bars, y="mutual information / maximum", title="token dependence")
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure


def bars(experiments: Experiments, table: Table) -> Figure:
    """Draw the test perplexity of each row, the lowest first: seeds, mean and standard deviation,
    in the colour of the row's group."""
    found = tested(experiments, table)
    found.sort(key=lambda o: statistics.fmean(o.perplexity("test").values()))
    groups = list(dict.fromkeys(o.row.group for o in experiments.outcomes(table) if o.row.group))
    colors = dict(zip(groups, COLORS, strict=False))
    figure = new(8.0, 1.2 + 0.34 * len(found))
    axes = figure.subplots()
    dots: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 4}
    for i, o in enumerate(found):
        values = o.perplexity("test")
        summary = summarize(values.values())
        assert summary is not None
        bar: dict[str, Any] = {
            "color": colors.get(o.row.group, COLORS[6]),
            "capsize": 4,
            "markersize": 14,
        }
        axes.errorbar(summary.mean, i, xerr=summary.sd, fmt="|", **bar)
        if len(values) > 1:
            axes.plot([*values.values()], [i] * len(values), color=bar["color"], **dots)
        if o.row.model == "dense":
            axes.axvline(summary.mean, color=GREY, linestyle="--", linewidth=1, zorder=0)
    for name, color in colors.items():
        axes.plot([], [], color=color, label=name, **dots)
    if colors:
        axes.legend(frameon=False, fontsize=9)
    axes.set_yticks(range(len(found)), [o.row.label for o in found])
    axes.invert_yaxis()
    finish(axes, "test perplexity (dots: seeds; bars: standard deviation; dashed: dense)")
    return figure


FIGURES: dict[str, Callable[[Experiments, Table], Figure]] = {
    **{"lines": lines, "flops": flops, "load": load, "gap": gap, "routing": routing, "bars": bars}
}
"""Kind of a figure -> the function that draws it, where there is something to draw."""
