"""What weight a selected block gets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def softmax(scores_NB: Tensor, blocks_NA: Tensor) -> Tensor:
    """Probability of the block among all blocks (Fedus et al. 2021, eq. 2)."""
    return torch.softmax(scores_NB, dim=-1).gather(1, blocks_NA)


def renormalized(scores_NB: Tensor, blocks_NA: Tensor) -> Tensor:
    """Probability of the block among the selected ones (Lepikhin et al. 2020, algorithm 1)."""
    return torch.softmax(scores_NB.gather(1, blocks_NA), dim=-1)


def sigmoid(scores_NB: Tensor, blocks_NA: Tensor) -> Tensor:
    """Each block by itself: the logistic function of its score."""
    return torch.sigmoid(scores_NB.gather(1, blocks_NA))


GATES: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "none": None,
    "softmax": softmax,
    "renormalized": renormalized,
    "sigmoid": sigmoid,
}
"""Gate name -> function of scores (N, B) and blocks (N, A) that gives weights (N, A)."""
