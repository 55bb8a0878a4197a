"""Losses that keep the blocks evenly used."""

from __future__ import annotations

import torch
from torch import Tensor


def assignment_counts(blocks_NA: Tensor, num_blocks: int, valid_N: Tensor | None) -> Tensor:
    """How many (token, block) assignments each block got: (B,) int64; padding does not count."""
    ones_NA = torch.ones_like(blocks_NA)
    if valid_N is not None:
        ones_NA = ones_NA * valid_N.unsqueeze(1)
    counts_B = blocks_NA.new_zeros(num_blocks)
    return counts_B.scatter_add_(0, blocks_NA.flatten(), ones_NA.flatten())


def balance_loss(scores_NB: Tensor, counts_B: Tensor, valid_N: Tensor | None) -> Tensor:
    """B * sum_i (mean softmax score of block i) * (share of the assignments to block i).

    Fedus et al. 2021, eq. 4. It is 1.0 at perfect balance and B when one block takes everything,
    whatever the number of blocks. (fairscale's is this over B^2; transformers' is this times the
    number of active blocks; Tutel's and the fairseq MoE branch's is the same.)
    """
    probs_NB = torch.softmax(_at_least_fp32(scores_NB), dim=-1)
    shares_B = counts_B.to(probs_NB.dtype) / counts_B.sum().clamp(min=1)
    return len(counts_B) * (_mean_over_tokens(probs_NB, valid_N) * shares_B).sum()


def z_loss(scores_NB: Tensor, valid_N: Tensor | None) -> Tensor:
    """Mean squared log-partition of the scores, to keep them small (Zoph et al. 2022, eq. 5)."""
    squares_N1 = torch.logsumexp(_at_least_fp32(scores_NB), dim=-1, keepdim=True).square()
    return _mean_over_tokens(squares_N1, valid_N).sum()


def _at_least_fp32(scores_NB: Tensor) -> Tensor:
    return scores_NB.to(torch.promote_types(scores_NB.dtype, torch.float32))


def _mean_over_tokens(values_NX: Tensor, valid_N: Tensor | None) -> Tensor:
    if valid_N is None:
        return values_NX.sum(dim=0) / max(len(values_NX), 1)
    weights_N = valid_N.to(values_NX.dtype) / valid_N.sum().clamp(min=1)
    with torch.autocast(values_NX.device.type, enabled=False):
        return weights_N @ values_NX
