"""Losses that keep the blocks evenly used."""

from __future__ import annotations

from torch import Tensor

from .scores import Scores, mean_over_tokens


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


def balance_loss(scores: Scores, counts_B: Tensor, valid_N: Tensor | None) -> Tensor:
    """B * sum_i (mean softmax score of block i) * (share of the assignments to block i).

    Fedus et al. 2021, eq. 4. It is 1.0 at perfect balance and B when one block takes everything,
    whatever the number of blocks. (fairscale's is this over B^2; transformers' is this times the
    number of active blocks; Tutel's and the fairseq MoE branch's is the same.)
    """
    probs_B = scores.mean_probs(valid_N)
    shares_B = counts_B.to(probs_B.dtype) / counts_B.sum().clamp(min=1)
    return len(counts_B) * (probs_B * shares_B).sum()


def z_loss(scores: Scores, valid_N: Tensor | None) -> Tensor:
    """Mean squared log-partition of the scores, to keep them small (Zoph et al. 2022, eq. 5)."""
    return mean_over_tokens(scores.log_partition().square(), valid_N).mean()
