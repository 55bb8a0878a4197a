"""What several trainings say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation.

    Attributes:
        mean: of the values.
        sd: with n - 1; ``None``: of one value.
        count: of values.
    """

    mean: float
    sd: float | None
    count: int


def summarize(values: Iterable[float]) -> Summary | None:
    """Summary of values; ``None`` where there is none."""
    values = list(values)
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), sd, len(values))


@dataclass(frozen=True)
class Deviation:
    """Standard deviation of values beside the effects of their row and their seed, if it is the
    same everywhere.

    Attributes:
        sd: root of the residual variance.
        degrees_of_freedom: of the residuals.
        rows: that have several seeds.
    """

    sd: float
    degrees_of_freedom: int
    rows: int


def residual_deviation(rows: Iterable[Mapping[int, float]]) -> Deviation | None:
    """Deviation beside the effects of row and seed, fitted by least squares: a seed draws the
    training text, and so raises or lowers all rows alike.

    Args:
        rows: seed -> value.

    Returns:
        ``None`` where too few values have both in common.
    """
    several = [row for row in rows if len(row) > 1]  # one value is fitted exactly
    seeds = sorted({seed for row in several for seed in row})
    values = [(i, seeds.index(seed), v) for i, row in enumerate(several) for seed, v in row.items()]
    if not values:
        return None
    index = torch.tensor([(row, seed) for row, seed, _ in values])
    of_row, of_seed = index.unbind(dim=1)
    found = torch.tensor([value for *_, value in values], dtype=torch.float64)
    design = torch.cat([one_hot(of_row), one_hot(of_seed)], dim=1).double()
    degrees = len(values) - int(torch.linalg.matrix_rank(design))
    if not degrees:
        return None
    fit = design @ torch.linalg.pinv(design) @ found
    variance = float((found - fit).square().sum()) / degrees
    return Deviation(math.sqrt(variance), degrees, len(several))


@dataclass(frozen=True)
class Difference:
    """One mean less another.

    Attributes:
        mean: the difference.
        standard_error: of it; ``None``: not known.
        significant: what it has to exceed to differ from 0 at 95%; ``None``: not known.
    """

    mean: float
    standard_error: float | None = None
    significant: float | None = None


def difference(first: Summary, second: Summary, beside: Deviation | None) -> Difference:
    """First mean minus second, of the same seeds, of values that deviate as others do."""
    assert first.count == second.count
    mean = first.mean - second.mean
    if beside is None:
        return Difference(mean)
    error = beside.sd * math.sqrt(2 / first.count)
    return Difference(mean, error, t_quantile(beside.degrees_of_freedom) * error)


def t_quantile(degrees_of_freedom: int, share: float = 0.95) -> float:
    """What Student's t stays within, on both sides of 0, with that probability."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halvings, down to rounding
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, degrees_of_freedom) < share else (low, middle)
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def t_share(angle: float, degrees_of_freedom: int) -> float:
    """Probability that Student's t stays within sqrt(degrees_of_freedom) tan(angle) on both sides
    of 0: equations 26.7.3 and 26.7.4 of Abramowitz and Stegun 1964."""
    odd = degrees_of_freedom % 2
    term = math.sin(angle) * math.cos(angle) ** odd
    total = angle if odd else 0.0
    for power in range(odd, degrees_of_freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    return 2 / math.pi * total if odd else total


def shared_blocks(blocks_PA: Sequence[Sequence[int]]) -> Tensor:
    """How much positions agree in their blocks.

    Args:
        blocks_PA: A distinct blocks of each of P positions.

    Returns:
        (P, P) blocks that two positions share, over A.
    """
    blocks = torch.tensor(blocks_PA)
    uses = torch.zeros(len(blocks), int(blocks.max()) + 1, dtype=torch.float64)
    uses.scatter_(1, blocks, 1.0)
    return uses @ uses.T / blocks.shape[1]


def same_token(ids_P: Sequence[int]) -> Tensor:
    """(P, P) 1 where two positions have the same token, 0 elsewhere."""
    ids = torch.tensor(ids_P)
    return (ids[:, None] == ids[None, :]).double()


def correlation(first_PP: Tensor, second_PP: Tensor) -> float | None:
    """Pearson's correlation of two symmetric matrices beside their diagonals; ``None``: one of them
    is constant there."""
    rows, columns = torch.triu_indices(len(first_PP), len(first_PP), offset=1)
    first = first_PP[rows, columns] - first_PP[rows, columns].mean()
    second = second_PP[rows, columns] - second_PP[rows, columns].mean()
    scale = float(first.norm() * second.norm())
    return float(first @ second) / scale if scale > 1e-12 else None
