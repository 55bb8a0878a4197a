"""Draws the figures of tables, with matplotlib."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, PercentFormatter

from .files import REFERENCE, Table
from .outcomes import Experiments, Outcome
from .points import gap_points, line_points, routed, tested
from .summaries import Summary, summarize
from .tables.perplexity import flops_unit
from .tables.routing import token_share

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
"""Okabe and Ito's, which the colour-blind tell apart, and one more in the place of their yellow."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
GREY = "#666666"
DPI = 150


def style(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th curve."""
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}


def line(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th curve that has no markers."""
    dashes = LINES[(i + i // len(COLORS)) % len(LINES)]
    return {"color": COLORS[i % len(COLORS)], "linestyle": dashes, "linewidth": 1.5}


def new(width: float = 8.0, height: float = 4.5) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def finish(axes: Axes) -> None:
    """What all axes have in common."""
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """The bytes of a PNG, the same whenever it is made."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def error_bars(axes: Axes, points: Sequence[tuple[float, Summary]], label: str, i: int) -> None:
    """A line through means, with their deviations."""
    points = sorted(points, key=lambda point: point[0])
    xs, found = [x for x, _ in points], [summary for _, summary in points]
    several = any(summary.sd is not None for summary in found)
    axes.errorbar(
        xs,
        [summary.mean for summary in found],
        yerr=[summary.sd or 0.0 for summary in found] if several else None,
        label=label,
        capsize=3,
        markersize=5,
        linewidth=1.5,
        **style(i),
    )


def log_axis(
    axes: Axes, values: Iterable[float], base: float, show: Callable[[float], str]
) -> None:
    """A logarithmic horizontal axis, with ticks at the values that there are."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [show(x) for x in ticks])


def lines(experiments: Experiments, table: Table) -> Figure:
    """Perplexity on test against ``x``, a line for each group; rows without either are levels."""
    figure = new()
    axes = figure.subplots()
    groups = line_points(experiments, table)
    for i, (name, points) in enumerate(groups.items()):
        error_bars(axes, points, name, i)
    levels = [o for o in experiments.outcomes(table) if not o.row.group or o.row.x == ""]
    for i, o in enumerate(levels):
        if found := summarize(o.perplexity("test").values()):
            axes.axhline(
                found.mean, color=GREY, linestyle=("--", ":", "-.")[i % 3], label=o.row.label
            )
    seen = [x for points in groups.values() for x, _ in points]
    log_axis(axes, seen, 2, lambda x: f"{x:g}")
    axes.set_xlabel(table.axis)
    axes.set_ylabel("test perplexity")
    figure.legend(loc="outside right upper", frameon=False)
    finish(axes)
    return figure


def flops(experiments: Experiments, table: Table) -> Figure:
    """Draw test perplexity against training FLOPs."""
    outcomes = tested(experiments, table)
    unit, name = flops_unit(max(map(experiments.training_flops, outcomes)))
    figure = new()
    axes = figure.subplots()
    for i, o in enumerate(outcomes):
        if summary := summarize(o.perplexity("test").values()):
            point = (experiments.training_flops(o) / unit, summary)
            error_bars(axes, [point], o.row.label, i)
    axes.margins(0.12)
    axes.set_xlabel(name)
    axes.set_ylabel("test perplexity")
    figure.legend(loc="outside right upper", frameon=False)
    finish(axes)
    return figure


def curve(outcome: Outcome, name: str) -> tuple[list[float], list[float]]:
    """Updates, and a value of the training's log at each, the mean of the seeds."""
    values: dict[float, list[float]] = {}
    for result in outcome.good.values():
        for record in result["training"]["train"]:
            if name in record:
                values.setdefault(record["update"], []).append(record[name])
    updates = sorted(values)
    return updates, [statistics.fmean(values[update]) for update in updates]


def load(experiments: Experiments, table: Table) -> Figure:
    """How the load of blocks went in training: a column for each group of rows."""
    by_group: dict[str, list[Outcome]] = {}
    for o in routed(experiments, table):
        by_group.setdefault(o.row.group, []).append(o)
    figure = new(max(6.0, 4.2 * len(by_group)), 7.0)
    panels = figure.subplots(2, len(by_group), sharex=True, sharey="row", squeeze=False)
    for (loads, used), (name, rows) in zip(panels.T, by_group.items(), strict=True):
        for i, o in enumerate(rows):
            memory = experiments.model(o.row).memory
            assert memory is not None
            loads.plot(*curve(o, "load_max"), **line(i))
            updates, unused = curve(o, "unused_blocks")
            share = [1 - blocks / memory.num_blocks for blocks in unused]
            used.plot(updates, share, label=o.row.label, **line(i))
        loads.set_title(name, fontsize=10)
        used.set_xlabel("updates")
        used.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
        for axes in (loads, used):
            finish(axes)
    loads, used = panels[:, 0]
    loads.set_ylabel("most loaded block / mean")
    loads.set_yscale("log", base=2)
    loads.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    loads.yaxis.set_major_formatter("{x:g}")
    loads.set_ylim(bottom=1)
    used.set_ylabel("used blocks")
    used.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    return figure


def gap(experiments: Experiments, table: Table) -> Figure:
    """How much higher each group's perplexity is than the reference's."""
    figure = new()
    axes = figure.subplots()
    groups = gap_points(experiments, table)
    for i, (name, points) in enumerate(groups.items()):
        error_bars(axes, points, name, i)
    seen = [x for points in groups.values() for x, _ in points]
    axes.axhline(0, color=GREY, linestyle="--", label=REFERENCE)
    log_axis(axes, seen, 10, short)
    axes.yaxis.set_major_formatter("{x:+.0%}")
    axes.set_xlabel(table.axis or "training tokens")
    axes.set_ylabel("test perplexity, against dense")
    figure.legend(loc="outside right upper", frameon=False)
    finish(axes)
    return figure


def short(value: float) -> str:
    """A number with a suffix for thousands and millions."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:g}"


LEAST_LOAD = 1 / 16
"""Loads of blocks below it, over the mean, are not told apart."""


def routing(experiments: Experiments, table: Table) -> Figure:
    """Blocks by load, in each layer, and how far the token id decides the block."""
    outcomes = routed(experiments, table)
    layers = list(dict.fromkeys(layer for o in outcomes for layer in o.layers))
    figure = new(3.6 * (len(layers) + 1), 4.2)
    *loads, bars = figure.subplots(1, len(layers) + 1)
    for axes, layer in zip(loads, layers, strict=True):
        for i, o in enumerate(outcomes):
            if layer not in o.layers:
                continue
            counts = o.good[min(o.good)]["routing"][layer]["counts"]
            ordered = sorted(counts, reverse=True)
            mean = sum(counts) / len(counts)
            axes.step(
                [j / len(counts) for j in range(len(counts) + 1)],
                [count / mean for count in [*ordered, ordered[-1]]],
                where="post",
                label=o.row.label if layer == o.layers[0] else None,
                **line(i),
            )
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.set_xlabel("blocks, most loaded first")
        axes.set_ylabel("load / mean")
        axes.set_yscale("log", base=2, nonpositive="clip")
        axes.set_ylim(bottom=LEAST_LOAD)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
        finish(axes)
    token_bars(experiments, outcomes, layers, bars)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure


def token_bars(
    experiments: Experiments, outcomes: Sequence[Outcome], layers: Sequence[str], axes: Axes
) -> None:
    """How far the token id decides the block: a bar for each row and layer."""
    width = 0.8 / len(outcomes)
    for i, o in enumerate(outcomes):
        memory = experiments.model(o.row).memory
        assert memory is not None
        for j, layer in enumerate(layers):
            found = [r["routing"][layer] for r in o.good.values() if layer in r["routing"]]
            shares = [token_share(f, memory.active_blocks) for f in found]
            if summary := summarize(share for share in shares if share is not None):
                x = j + (i - (len(outcomes) - 1) / 2) * width
                axes.bar(x, summary.mean, width, yerr=summary.sd, color=COLORS[i % len(COLORS)])
    axes.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.set_ylim(0, 1.05)
    axes.set_title("token dependence", fontsize=10)
    axes.set_ylabel("mutual information / maximum")
    finish(axes)


def bars(experiments: Experiments, table: Table) -> Figure:
    """Test perplexity of each row, the lowest first: seeds, and their mean and deviation, in the
    colour of the row's group."""
    found = tested(experiments, table)
    found.sort(key=lambda o: statistics.fmean(o.perplexity("test").values()))
    groups = list(dict.fromkeys(o.row.group for o in experiments.outcomes(table) if o.row.group))
    colors = dict(zip(groups, COLORS, strict=False))
    figure = new(8.0, 1.2 + 0.34 * len(found))
    axes = figure.subplots()
    for i, o in enumerate(found):
        values = o.perplexity("test")
        summary = summarize(values.values())
        assert summary is not None
        color = colors.get(o.row.group, COLORS[6])
        axes.errorbar(
            summary.mean, i, xerr=summary.sd, fmt="|", color=color, capsize=4, markersize=14
        )
        if len(values) > 1:
            axes.plot([*values.values()], [i] * len(values), "o", color=color, markersize=4)
        if o.row.model == "dense":
            axes.axvline(summary.mean, color=GREY, linestyle="--", linewidth=1, zorder=0)
    for name, color in colors.items():
        axes.plot([], [], "o", color=color, markersize=4, label=name)
    if colors:
        axes.legend(frameon=False, fontsize=9)
    axes.set_yticks(range(len(found)), [o.row.label for o in found])
    axes.invert_yaxis()
    axes.set_xlabel("test perplexity (dots: seeds; bars: standard deviation; dashed: dense)")
    finish(axes)
    return figure


FIGURES: dict[str, Callable[[Experiments, Table], Figure]] = {
    "lines": lines,
    "flops": flops,
    "load": load,
    "gap": gap,
    "routing": routing,
    "bars": bars,
}
"""Kind of a figure -> what draws it, where there is something to draw."""
