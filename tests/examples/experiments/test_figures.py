"""Figures of results that were made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from experiments import figures
from experiments.files import Row, Table
from experiments.frame import Experiments
from tests.examples.experiments import made

ROWS = (
    Row("dense", "dense", seeds=(1, 2), group="none"),
    Row("Avg-K", "avgk", seeds=(1, 2), group="keys", x=1),
    Row("Avg-K, g = 8", "avgk", "--sffn-block-size 8", group="keys", x=8),
    Row("Switch", "switch", group="gate"),
)
TEST = {"dense": 100.0, "Avg-K": 80.0, "Avg-K, g = 8": 90.0, "Switch": 95.0}
TABLE = made.table(*ROWS, axis="block size")
GAP = made.table(
    Row("dense", "dense", seeds=(1, 2), group="dense"),
    Row("Avg-K", "avgk", seeds=(1, 2), group="keys"),
    name="gap",
)
BLOCKS = {"dense": 0, "Avg-K": 128, "Avg-K, g = 8": 1024, "Switch": 16}


@pytest.fixture
def experiments(tmp_path: Path) -> Experiments:
    results = made.empty(tmp_path)

    def make(row: Row, run: Any) -> Any:
        """Make a result whose validation split says the opposite."""
        test = TEST[row.label] + run.seed
        return made.result(test, BLOCKS[row.label], run.seed, valid=1000 / test)

    made.fill(results, ROWS, make)
    return Experiments(results.scale, results, {"t": TABLE, "gap": GAP})


def draw(experiments: Experiments, table: Table, kind: str) -> list[Axes]:
    figure = figures.draw(experiments, replace(table, figure=kind))
    assert figure is not None
    return figure.axes


def test_bars_are_in_order_and_coloured_by_group(experiments: Experiments) -> None:
    (axes,) = draw(experiments, TABLE, "bars")
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["Avg-K", "Avg-K, g = 8", "Switch", "dense"]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["none", "keys", "gate"]
    means = {round(float(bar.lines[0].get_xdata()[0]), 6): bar for bar in axes.containers}
    assert list(means) == [81.5, 91.0, 96.0, 101.5]
    colors = [bar.lines[0].get_color() for bar in means.values()]
    assert colors[0] == colors[1] and len(set(colors)) == 3


def test_lines_and_points_show_the_test_split(experiments: Experiments) -> None:
    (axes,) = draw(experiments, TABLE, "lines")
    (line,) = axes.containers[0].lines[:1]
    assert list(line.get_xdata()) == [1, 8] and list(line.get_ydata()) == [81.5, 91.0]
    levels = {line.get_label(): line.get_ydata()[0] for line in axes.lines if line.get_label()}
    # These rows have no position on the axis.
    assert levels.items() >= {("dense", 101.5), ("Switch", 96.0)}
    (points,) = draw(experiments, TABLE, "flops")
    assert [bar.lines[0].get_ydata()[0] for bar in points.containers] == [101.5, 81.5, 91.0, 96.0]


def test_a_gap_is_that_of_the_same_seed_on_the_test_split(experiments: Experiments) -> None:
    (axes,) = draw(experiments, GAP, "gap")
    (gap,) = axes.containers[0].lines[0].get_ydata()
    assert gap == pytest.approx((81 / 101 + 82 / 102) / 2 - 1)


def test_loads_have_a_column_for_each_group(experiments: Experiments) -> None:
    axes = draw(experiments, TABLE, "load")
    loads, used = axes[:2], axes[2:]
    assert [axes.get_title() for axes in loads] == ["keys", "gate"]
    for axes, rows in zip(used, (ROWS[1:3], ROWS[3:]), strict=True):
        assert [line.get_label() for line in axes.lines] == [row.label for row in rows]
        for line, row in zip(axes.lines, rows, strict=True):
            # The log has 10 - update / 4 unused blocks.
            shares = [1 - (10 - u / 4) / BLOCKS[row.label] for u in range(8, 41, 8)]
            assert list(line.get_ydata()) == pytest.approx(shares)
    for axes, rows in zip(loads, (ROWS[1:3], ROWS[3:]), strict=True):
        assert len(axes.lines) == len(rows)
        assert list(axes.lines[0].get_ydata()) == pytest.approx(
            [9 - u / 5 for u in range(8, 41, 8)]
        )
