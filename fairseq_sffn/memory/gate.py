"""Gates: the weight of a selected block, from the scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .scores import Scores


def softmax(scores: Scores, blocks_NA: Tensor) -> Tensor:
    """Return the probability of each block among all blocks (Fedus et al. 2021, eqs. 1 and 2)."""
    return scores.log_probs(blocks_NA).exp()


def renormalized(scores: Scores, blocks_NA: Tensor) -> Tensor:
    """Return its probability among the selected blocks (Lepikhin et al. 2020, algorithm 1)."""
    return torch.softmax(scores.of(blocks_NA), dim=-1)


def sigmoid(scores: Scores, blocks_NA: Tensor) -> Tensor:
    """Return the logistic function of each block's score (Lewis et al. 2021)."""
    return torch.sigmoid(scores.of(blocks_NA))


GATES: dict[str, Callable[[Scores, Tensor], Tensor] | None] = {
    "none": None,
    "softmax": softmax,
    "renormalized": renormalized,
    "sigmoid": sigmoid,
}
"""Gate name -> function from scores and blocks (N, A) to weights (N, A)."""


def score_function(gate: str) -> str:
    """Return the score function of a gate: ``logits`` without a gate."""
    return {"none": "logits", "sigmoid": "sigmoid"}.get(gate, "softmax")
