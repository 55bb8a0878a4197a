"""Statistics of several runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of a sample.

    Attributes:
        mean: mean of the values.
        sd: sample standard deviation; ``None`` for one value.
        count: number of values.
    """

    mean: float
    sd: float | None
    count: int


def summarize(values: Iterable[float]) -> Summary | None:
    """Summarise a sample; ``None`` where it is empty."""
    values = list(values)
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), sd, len(values))


@dataclass(frozen=True)
class Deviation:
    """Residual standard deviation after the effects of row and seed, assumed equal for all rows.

    Attributes:
        sd: root of the residual variance.
        degrees_of_freedom: degrees of freedom of the residuals.
        rows: number of rows with several seeds.
    """

    sd: float
    degrees_of_freedom: int
    rows: int


def residual_deviation(rows: Iterable[Mapping[int, float]]) -> Deviation | None:
    """Fit the effects of row and seed by least squares. A seed selects the training text, so its
    effect is common to all rows.

    Args:
        rows: for each row, seed -> value.

    Returns:
        The residual deviation; ``None`` where no degree of freedom is left.
    """
    several = [row for row in rows if len(row) > 1]  # a single value is fitted exactly
    seeds = sorted({seed for row in several for seed in row})
    values = [(i, seeds.index(seed), v) for i, row in enumerate(several) for seed, v in row.items()]
    if not values:
        return None
    row_index, seed_index, found = map(np.array, zip(*values, strict=True))
    design = np.hstack([np.eye(len(several))[row_index], np.eye(len(seeds))[seed_index]])
    fit, _, rank, _ = np.linalg.lstsq(design, found)
    degrees = len(values) - int(rank)
    if not degrees:
        return None
    variance = float(np.square(found - design @ fit).sum()) / degrees
    return Deviation(math.sqrt(variance), degrees, len(several))


@dataclass(frozen=True)
class Difference:
    """A difference of two means.

    Attributes:
        mean: the difference.
        standard_error: its standard error; ``None`` where it is unknown.
        significant: the least absolute difference that is significant, by a two-sided t-test at
            ``CONFIDENCE``; ``None`` where it is unknown.
        degrees_of_freedom: degrees of freedom of the standard error.
    """

    mean: float
    standard_error: float | None = None
    significant: float | None = None
    degrees_of_freedom: int = 0

    def equivalent(self, margin: float) -> bool:
        """Return whether two one-sided t-tests (TOST) place the difference within ± margin."""
        if not self.standard_error:
            return False
        below, above = (
            float(stdtr(self.degrees_of_freedom, (sign * self.mean - margin) / self.standard_error))
            for sign in (1, -1)
        )
        return max(below, above) < 1 - CONFIDENCE


def difference(first: Summary, second: Summary, deviation: Deviation | None) -> Difference:
    """Subtract the second mean from the first, both over the same seeds."""
    assert first.count == second.count
    mean = first.mean - second.mean
    if deviation is None:
        return Difference(mean)
    error = deviation.sd * math.sqrt(2 / first.count)
    freedom = deviation.degrees_of_freedom
    return Difference(mean, error, t_quantile(freedom) * error, freedom)


def t_quantile(degrees_of_freedom: int, share: float = CONFIDENCE) -> float:
    """Return the bound that Student's t stays within, on both sides of 0, with a probability."""
    return float(stdtrit(degrees_of_freedom, (1 + share) / 2))


def shared_blocks(blocks_PA: Sequence[Sequence[int]]) -> Tensor:
    """Compare the blocks of positions.

    Args:
        blocks_PA: (P, A) the distinct blocks of each position.

    Returns:
        (P, P) share of their blocks that two positions have in common.
    """
    blocks = torch.tensor(blocks_PA)
    uses = torch.zeros(len(blocks), int(blocks.max()) + 1, dtype=torch.float64)
    uses.scatter_(1, blocks, 1.0)
    return uses @ uses.T / blocks.shape[1]


def same_token(ids_P: Sequence[int]) -> Tensor:
    """Return (P, P) 1.0 where two positions have the same token, 0.0 elsewhere."""
    ids = torch.tensor(ids_P)
    return (ids[:, None] == ids[None, :]).double()


def correlation(first_PP: Tensor, second_PP: Tensor) -> float | None:
    """Return Pearson's correlation of two symmetric matrices without their diagonals; ``None``
    where one of them is constant."""
    rows, columns = torch.triu_indices(len(first_PP), len(first_PP), offset=1)
    first = first_PP[rows, columns] - first_PP[rows, columns].mean()
    second = second_PP[rows, columns] - second_PP[rows, columns].mean()
    scale = float(first.norm() * second.norm())
    return float(first @ second) / scale if scale > 1e-12 else None
