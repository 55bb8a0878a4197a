"""How the gap to the dense model changes along an axis, such as that of training tokens."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from .claims import LEVEL, Deviation, seed_deviation
from .files import REFERENCE, Table
from .frame import Experiments

LEAST_POINTS = 3
"""A line through fewer points would fit them exactly."""


class Trend(NamedTuple):
    """A line through gaps: log(perplexity / the reference's), against log2 of the position.

    The errors come from the deviation of seeds. Where the points scatter more than this deviation
    explains, they are larger by the ratio of the two.
    """

    group: str
    middle: float  # log2 of the position to which the intercept belongs
    intercept: float
    slope: float  # change of the gap when the position doubles
    intercept_error: float
    slope_error: float
    quantile: float  # of Student's t

    def at(self, position: float) -> tuple[float, float, float]:
        """Return the gap at a position, and the ends of its 95% interval."""
        distance = math.log2(position) - self.middle
        gap = self.intercept + self.slope * distance
        error = self.quantile * math.hypot(self.intercept_error, self.slope_error * distance)
        return gap, gap - error, gap + error

    def change(self) -> tuple[float, float, float]:
        """Return the change of the gap when the position doubles, and its 95% interval."""
        error = self.quantile * self.slope_error
        return self.slope, self.slope - error, self.slope + error


def gaps(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the gap of each run to the reference group's at the same position and seed. The
    position is ``x``, or the number of training tokens where a row has no ``x``.

    Returns:
        columns ``group``, ``where``, ``seed`` and ``gap``, a difference of log test perplexity.
    """
    runs = runs[(runs.group != "") & runs.test.notna()]
    runs = runs.assign(where=runs.x.fillna(runs.tokens))
    others, base = runs[runs.group != REFERENCE], runs[runs.group == REFERENCE]
    pairs = others.merge(base[["where", "seed", "test"]], on=["where", "seed"])
    return pairs.assign(gap=np.log(pairs.test_x) - np.log(pairs.test_y))


def trends(experiments: Experiments, table: Table) -> list[Trend]:
    """Fit a line to the gaps of each group from ``trend_from`` on. There are none where a group has
    too few points, or where the deviation of seeds is not known."""
    deviation = seed_deviation(experiments.frame)
    if table.trend_from is None or deviation is None:
        return []
    found = gaps(experiments.runs(table))
    found = found[found["where"] >= table.trend_from]
    return [
        fit(str(group), points.groupby("where").gap.agg(["mean", "size"]), deviation)
        for group, points in found.groupby("group", sort=False)
        if points["where"].nunique() >= LEAST_POINTS
    ]


def fit(group: str, points: pd.DataFrame, deviation: Deviation) -> Trend:
    """Fit a line by least squares, weighted by the number of seeds.

    Args:
        group: the name of the line.
        points: ``mean`` of the gaps, and their number (``size``), by position.
        deviation: the deviation of seeds.
    """
    x, y = np.log2(points.index.to_numpy(float)), points["mean"].to_numpy()
    weights = np.array([1 / deviation.error(count) for count in points["size"]])
    middle = np.average(x, weights=weights**2)  # where the errors of the two are independent
    line, covariance = np.polyfit(x - middle, y, 1, w=weights, cov="unscaled")
    scatter = np.sum((weights * (y - np.polyval(line, x - middle))) ** 2) / (len(x) - 2)
    slope_error, error = np.sqrt(np.diag(covariance) * max(1.0, scatter))
    quantile = float(stdtrit(deviation.degrees_of_freedom, 1 - LEVEL / 2))
    slope, intercept = line
    return Trend(group, middle, intercept, slope, error, slope_error, quantile)
