"""Routing statistics.

They are counts, which add up over calls, micro-batches and ranks. The functions compute ratios from
the sums.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .selection import Selection


class Usage(NamedTuple):
    """The assignments of one pass.

    Attributes:
        counts: (B,) int64 assignments per block, padding excluded, before capacity drops any.
        dropped: () int64 assignments dropped by the capacity.
        importance: (B,) sum of the absolute weights or coefficients of each block's assignments;
            the counts where a method has neither.
        sent: () int64 bytes that this rank sends to others, including gradients and the repeated
            forward pass of activation checkpointing.
        scored: () int64 tokens of the next two sums; 0 if the losses were not requested, or the
            selector has no scores.
        routed_mass: () sum over tokens of the share of a token's scores that its blocks have.
        entropy: () sum over tokens of the entropy of the shares over its maximum, log B.
        bias_range: () the highest bias minus the lowest (:class:`.balancer.Balancer`).
    """

    counts: Tensor
    dropped: Tensor
    importance: Tensor
    sent: Tensor
    scored: Tensor
    routed_mass: Tensor
    entropy: Tensor
    bias_range: Tensor


def block_importance(selection: Selection, counts_B: Tensor, counted: Tensor | None) -> Tensor:
    """Compute ``Usage.importance``: (B,).

    Args:
        selection, counted: see :meth:`.selection.Selection.counted`.
        counts_B: ``Usage.counts``.
    """
    factors = [t for t in (selection.weights, selection.coefficients) if t is not None]
    if not factors:
        return counts_B.float()
    importance_NA = reduce(torch.mul, (t.detach().float() for t in factors)).abs()
    importance_NA = importance_NA if counted is None else importance_NA * counted
    importance_B = importance_NA.new_zeros(len(counts_B))
    return importance_B.scatter_add_(0, selection.blocks.flatten(), importance_NA.flatten())


def score_statistics(
    selection: Selection, function: str, valid_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``Usage.scored``, ``Usage.routed_mass`` and ``Usage.entropy``.

    Args:
        selection: with scores.
        function: the score function; see :meth:`.scores.Scores.shares`.
        valid_N: bool, ``False`` at padding; ``None``: no padding.
    """
    assert selection.scores is not None
    with torch.no_grad():
        mass_N = selection.scores.mass(selection.blocks, function)
        rows_N2 = torch.stack([mass_N, selection.scores.entropy(function)], dim=1)
        if valid_N is None:
            tokens = torch.full((), len(rows_N2), device=rows_N2.device)
        else:
            tokens, rows_N2 = valid_N.sum(), rows_N2.masked_fill(~valid_N.unsqueeze(1), 0.0)
    mass, entropy = rows_N2.sum(dim=0).unbind()
    return tokens, mass, entropy


def load_entropy(counts_B: Tensor) -> float:
    """Return the entropy of the load over its maximum log B: 1 if even, 0 if one block has all."""
    if len(counts_B) < 2:
        return 1.0
    shares_B = counts_B.double() / counts_B.sum().clamp(min=1)
    entropy = torch.special.entr(shares_B).sum()
    return float(entropy / torch.log(torch.tensor(float(len(counts_B)))))


def load_max(counts_B: Tensor) -> float:
    """Return the maximum load over the mean load: 1 if even."""
    return float(counts_B.max() / counts_B.double().mean().clamp(min=1e-9))


def load_min(counts_B: Tensor) -> float:
    """Return the minimum load over the mean load: 1 if even."""
    return float(counts_B.min() / counts_B.double().mean().clamp(min=1e-9))


def unused_blocks(counts_B: Tensor) -> int:
    """Return the number of blocks that no token used."""
    return int((counts_B == 0).sum())


def memory_usage(counts_B: Tensor) -> float:
    """Return the share of blocks that some token used (Lample et al. 2019, arXiv 1907.05242)."""
    return 1 - unused_blocks(counts_B) / len(counts_B)


def load_kl(importance_B: Tensor) -> float:
    """Return the Kullback-Leibler divergence of the weighted load from the uniform distribution.

    In nats: 0 if even, log B if one block has all (Lample et al. 2019, arXiv 1907.05242).
    """
    shares_B = importance_B.double() / importance_B.double().sum().clamp(min=1e-30)
    return float(torch.xlogy(shares_B, shares_B * len(importance_B)).sum())


def dropped_share(counts_B: Tensor, dropped: Tensor) -> float:
    """Return the share of assignments that were dropped."""
    return float(dropped / counts_B.sum().clamp(min=1))
