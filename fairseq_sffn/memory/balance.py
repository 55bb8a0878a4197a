"""Losses that keep the blocks evenly used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .scores import Scores, mean_over_tokens

Total = Callable[[Tensor], Tensor]


def assignment_counts(blocks_NA: Tensor, num_blocks: int, counted: Tensor | None) -> Tensor:
    """How many of the ``counted`` (token, block) assignments each block got: (B,) int64.

    ``counted`` is bool and broadcasts to (N, A); ``None`` counts all.
    """
    if counted is None:
        ones_NA = blocks_NA.new_ones(blocks_NA.shape)
    else:
        ones_NA = counted.to(blocks_NA.dtype).expand_as(blocks_NA)
    counts_B = blocks_NA.new_zeros(num_blocks)
    return counts_B.scatter_add_(0, blocks_NA.flatten(), ones_NA.flatten())


def balance_loss(
    scores: Scores, counts_B: Tensor, valid_N: Tensor | None, total: Total | None = None
) -> Tensor:
    """B * sum_i (mean softmax score of block i) * (share of the assignments to block i).

    Fedus et al. 2021, eq. 4. It is 1.0 at perfect balance and B when one block takes everything,
    whatever the number of blocks. It is computed of all tokens of a micro-batch, for each layer.

    Tutel's and the fairseq MoE branch's are the same. fairscale's is this over B^2. transformers'
    Mixtral's of one layer is this times the number of active blocks. No factor converts others:
    transformers' Mixtral pools the tokens of several layers; transformers' Switch, st-moe-pytorch
    and mixture-of-experts compute the loss of each sequence and average these, and Switch pools
    the layers of a sequence too.

    Args:
        total: adds up a vector over the ranks whose tokens count together; gradients reach all.
    """
    probs_B = scores.mean_probs(valid_N)
    if total is not None:
        # One vector for all, in a dtype that keeps counts exact.
        tokens = _tokens(scores, valid_N).double()
        sums = total(torch.cat([probs_B.double() * tokens, tokens, counts_B.double()]))
        num_blocks = len(counts_B)
        probs_B = (sums[:num_blocks] / sums[num_blocks].clamp(min=1)).to(probs_B.dtype)
        counts_B = sums[num_blocks + 1 :].detach()
    shares_B = counts_B.to(probs_B.dtype) / counts_B.sum().clamp(min=1).to(probs_B.dtype)
    return len(counts_B) * (probs_B * shares_B).sum()


def z_loss(scores: Scores, valid_N: Tensor | None, total: Total | None = None) -> Tensor:
    """Mean squared log-partition of the scores, to keep them small (Zoph et al. 2022, eq. 5).

    Args:
        total: as in :func:`balance_loss`.
    """
    mean = mean_over_tokens(scores.log_partition().square(), valid_N).mean()
    if total is not None:
        tokens = _tokens(scores, valid_N).double()
        sums = total(torch.cat([mean.double() * tokens, tokens]))
        mean = (sums[0] / sums[1].clamp(min=1)).to(mean.dtype)
    return mean


def _tokens(scores: Scores, valid_N: Tensor | None) -> Tensor:
    """How many tokens count: (1,)."""
    if valid_N is None:
        # No `torch.tensor`, whose copy from the host waits for the device.
        return torch.full((1,), scores.num_tokens, device=scores.device)
    return valid_N.sum().unsqueeze(0)
