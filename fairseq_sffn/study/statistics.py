"""What several trainings say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
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
class Deviation:
    """Standard deviation within groups of values, if it is the same in all of them.

    Attributes:
        sd: root of the groups' mean variance, each weighed by its degrees of freedom.
        freedom: degrees of freedom of all groups.
        groups: of several values.
    """

    sd: float
    freedom: int
    groups: int


def pooled_deviation(summaries: Iterable[Summary]) -> Deviation | None:
    """Deviation within the groups that are summarised; ``None``: none has several values."""
    known = [(s.sd, s.count - 1) for s in summaries if s.sd is not None]
    if not known:
        return None
    freedom = sum(n for _, n in known)
    return Deviation(math.sqrt(sum(sd**2 * n for sd, n in known) / freedom), freedom, len(known))


@dataclass(frozen=True)
class Difference:
    """One mean less another.

    Attributes:
        mean: the difference.
        error: its standard error; ``None``: not known.
        least: what it has to exceed to differ from 0 at 95%; ``None``: not known.
    """

    mean: float
    error: float | None = None
    least: float | None = None


def difference(first: Summary, second: Summary, within: Deviation | None) -> Difference:
    """First mean minus second, of independent values that deviate as others do within groups."""
    mean = first.mean - second.mean
    if within is None:
        return Difference(mean)
    error = within.sd * math.sqrt(1 / first.count + 1 / second.count)
    return Difference(mean, error, t_quantile(within.freedom) * error)


def t_quantile(freedom: int, share: float = 0.95) -> float:
    """What Student's t stays within, on both sides of 0, with that probability."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halvings, down to rounding
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, freedom) < share else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def t_share(angle: float, freedom: int) -> float:
    """Probability that Student's t stays within sqrt(freedom) tan(angle) on both sides of 0:
    equations 26.7.3 and 26.7.4 of Abramowitz and Stegun 1964."""
    odd = freedom % 2
    term = math.sin(angle) * math.cos(angle) ** odd
    total = angle if odd else 0.0
    for power in range(odd, freedom - 1, 2):
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
