"""Lines through the gaps to the dense model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import figures
from experiments.claims import Deviation
from experiments.files import Row
from experiments.frame import Experiments
from experiments.tables.perplexity import perplexities
from experiments.trends import fit, trends
from tests.examples.experiments import made

LENGTHS = (1, 2, 4, 8)
GROUPS = {"dense": "dense", "keys": "avgk", "gate": "switch"}
ROWS = [
    Row(f"{group}, {length}", model, seeds=(1, 2), length=length, group=group)
    for group, model in GROUPS.items()
    for length in LENGTHS
]
TABLE = made.table(*ROWS, figure="gap", trend_from=2 * 40 * 8 * 16)
"""The lines begin at length 2: 40 updates of 8 times 16 tokens have length 1."""


def points(x: list[float], y: Any, counts: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"mean": y, "size": counts}, index=x)


def test_a_line_is_a_weighted_fit() -> None:
    """By the normal equations, with one over the variance of each point as its weight."""
    x, y, counts = [3.0, 6.0, 24.0, 48.0], [0.31, 0.2, 0.17, 0.02], [1, 3, 1, 2]
    for sd in (0.2, 0.001):  # more and less than the points scatter
        line = fit("keys", points(x, y, counts), Deviation(sd, 10, 4))
        weights = [count / (2 * sd**2) for count in counts]
        matrix, right = np.zeros((2, 2)), np.zeros(2)
        for weight, x_i, y_i in zip(weights, x, y, strict=True):
            row = np.array([np.log2(x_i), 1.0])
            matrix += weight * np.outer(row, row)
            right += weight * row * y_i
        covariance = np.linalg.inv(matrix)
        slope, intercept = covariance @ right
        scatter = (
            sum(
                weight * (y_i - slope * np.log2(x_i) - intercept) ** 2
                for weight, x_i, y_i in zip(weights, x, y, strict=True)
            )
            / 2
        )  # four points, and two parameters
        assert (scatter > 1) == (sd == 0.001)
        covariance = covariance * max(1.0, scatter)
        assert line.change()[0] == pytest.approx(slope)
        half = 2.228 * np.sqrt(covariance[0, 0])  # a quantile of Student's t, from a table
        assert line.change()[1:] == pytest.approx((slope - half, slope + half), rel=1e-3)
        for position in (3.0, 10.0, 96.0):
            at = np.array([np.log2(position), 1.0])
            gap, low, high = line.at(position)
            assert gap == pytest.approx(slope * at[0] + intercept)
            assert (high - low) / 2 == pytest.approx(
                2.228 * np.sqrt(at @ covariance @ at), rel=1e-3
            )


def test_intervals_hold_the_true_gap_in_95_of_100_cases() -> None:
    generator, x = np.random.default_rng(1), np.array([1.0, 2.0, 4.0, 8.0])
    inside = []
    for _ in range(400):
        errors = generator.normal(size=(4, 2)) * 0.05  # of a row and of the dense model
        sd = 0.05 * np.sqrt(generator.chisquare(30) / 30)
        gaps = 0.1 + 0.02 * np.log2(x) + errors[:, 0] - errors[:, 1]
        _, low, high = fit("g", points(list(x), gaps, [1] * 4), Deviation(sd, 30, 9)).at(16)
        inside.append(low < 0.1 + 0.02 * 4 < high)
    assert 0.93 < np.mean(inside) < 0.99  # 0.95, and more where points happen to scatter more


@pytest.fixture
def experiments(tmp_path: Path) -> Experiments:
    results = made.empty(tmp_path)

    def make(row: Row, run: Any) -> Any:
        """The gate's gap is 90% at length 1, 20% at 2, and 2% less at each doubling."""
        test = 100 / row.length * (1.01 if row.length == 2 and run.seed == 2 else 1.0)
        if row.group == "gate":
            test *= {1: 0.1, 2: 0.80, 4: 0.82, 8: 0.84}[row.length]
        return made.result(test, seed=run.seed)

    made.fill(results, ROWS, make)
    return Experiments(results.scale, results, {"t": TABLE})


def test_gaps_are_fitted_from_a_length_on(experiments: Experiments) -> None:
    keys, gate = trends(experiments, TABLE)
    assert (keys.group, gate.group) == ("keys", "gate")
    slope, level = np.polyfit([1, 2, 3], np.log([0.80, 0.82, 0.84]), 1)
    assert gate.change()[0] == pytest.approx(slope)
    assert gate.at(4 * 40 * 8 * 16)[0] == pytest.approx(level + 2 * slope)
    assert keys.at(1.0)[0] == pytest.approx(0) and keys.slope == pytest.approx(0)
    assert trends(experiments, replace(TABLE, trend_from=None)) == []
    assert trends(experiments, replace(TABLE, trend_from=4 * 40 * 8 * 16)) == []  # two points


def test_trends_are_shown(experiments: Experiments) -> None:
    parts = perplexities(experiments, TABLE)
    (part,) = parts["trends"]
    lines = part.markdown().splitlines()
    assert lines[0] == "| model | gap at 41k | change per doubling | extrapolated to 81.9k |"
    assert lines[2].startswith("| keys | +0.0% (-")
    change, further = lines[3].split(" | ")[2:]
    assert change.startswith("+2.5% (+") and further.startswith("-13.9% (-1")
    assert "from 10.2k on" in lines[-1]
    (axes,) = figures.draw(experiments, TABLE).axes  # type: ignore[union-attr]
    bands = axes.collections[-2:]
    ends = [band.get_paths()[0].vertices[:, 0] for band in bands]
    assert all(x.min() == pytest.approx(10240) and x.max() == pytest.approx(81920) for x in ends)
    (without,) = figures.draw(experiments, replace(TABLE, trend_from=None)).axes  # type: ignore[union-attr]
    assert len(axes.collections) == len(without.collections) + 2
