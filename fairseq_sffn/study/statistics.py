"""What several trainings say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
class Difference:
    """A mean of differences.

    Attributes:
        mean: of the differences.
        error: its standard error; ``None``: of one difference.
        count: of differences.
    """

    mean: float
    error: float | None
    count: int


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """First minus second, seed by seed, where both have that seed; ``None``: they share none."""
    summary = summarize(first[seed] - second[seed] for seed in sorted(first.keys() & second.keys()))
    if summary is None:
        return None
    error = None if summary.sd is None else summary.sd / math.sqrt(summary.count)
    return Difference(summary.mean, error, summary.count)


def pooled_deviation(summaries: Iterable[Summary]) -> float | None:
    """Root of the mean variance, each weighed by its degrees of freedom; ``None``: none is
    known."""
    known = [(s.sd, s.count - 1) for s in summaries if s.sd is not None]
    if not known:
        return None
    return math.sqrt(sum(sd**2 * n for sd, n in known) / sum(n for _, n in known))


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
