"""Routing statistics: counts that add up over layers' calls, micro-batches and workers, and the
ratios that follow from the sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Usage(NamedTuple):
    """What one pass sent where.

    Attributes:
        counts: (B,) int64 assignments per block, padding excluded, before any were dropped.
        dropped: () int64 assignments that found their block full.
        importance: (B,) absolute weights or coefficients, summed over each block's assignments; the
            counts again where a method has neither.
        sent: () int64 bytes that this rank sent to others for it, gradients and what activation
            checkpointing sends again included.
    """

    counts: Tensor
    dropped: Tensor
    importance: Tensor
    sent: Tensor


def load_entropy(counts_B: Tensor) -> float:
    """Entropy of the load over its maximum log B: 1 when even, 0 when one block takes all."""
    shares_B = counts_B.double() / counts_B.sum().clamp(min=1)
    entropy = torch.special.entr(shares_B).sum()
    return (
        float(entropy / torch.log(torch.tensor(float(len(counts_B))))) if len(counts_B) > 1 else 1.0
    )


def load_max(counts_B: Tensor) -> float:
    """Load of the most loaded block over the mean load: 1 when even."""
    return float(counts_B.max() / counts_B.double().mean().clamp(min=1e-9))


def unused_blocks(counts_B: Tensor) -> int:
    """How many blocks no token used."""
    return int((counts_B == 0).sum())


def memory_usage(counts_B: Tensor) -> float:
    """Share of the blocks that some token used (Lample et al. 2019)."""
    return 1 - unused_blocks(counts_B) / len(counts_B)


def load_kl(importance_B: Tensor) -> float:
    """Kullback-Leibler divergence of the weighed load from the uniform distribution, in nats: 0
    when even, log B when one block takes all (Lample et al. 2019, arXiv 1907.05242)."""
    shares_B = importance_B.double() / importance_B.double().sum().clamp(min=1e-30)
    return float(torch.xlogy(shares_B, shares_B * len(importance_B)).sum())


def dropped_share(counts_B: Tensor, dropped: Tensor) -> float:
    """Share of the assignments that were dropped."""
    return float(dropped / counts_B.sum().clamp(min=1))
