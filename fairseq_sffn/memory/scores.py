"""Scores of blocks: one logit for each token and block."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NUMPY_DTYPES = (torch.float32, torch.float64)
PARTITIONED_BLOCKS, PARTITIONED_SCORES, PARTITIONED_ACTIVE = 128, 2**14, 8
"""Numbers of blocks, scores and active blocks from which on NumPy's partial sort is faster than
``topk`` on a CPU."""


class Scores:
    """One logit for each token and block, and the softmax over blocks.

    Args:
        logits: (N, B), higher is better.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.num_tokens, self.num_blocks = logits.shape
        self.device = logits.device
        self._probs: Tensor | None = None

    def top(self, active_blocks: int) -> Tensor:
        """Return the blocks with the highest scores, best first: (N, A) int64."""
        return top_blocks(self.logits, active_blocks)

    def of(self, blocks_NA: Tensor) -> Tensor:
        """Return the scores of the given blocks: (N, A)."""
        return self.logits.gather(1, blocks_NA)

    def log_probs(self, blocks_NA: Tensor) -> Tensor:
        """Return the log-probability of the given blocks among all blocks: (N, A)."""
        return self.of(blocks_NA) - self.log_partition()

    def log_partition(self) -> Tensor:
        """Return the log of the summed exponentials of a token's scores: (N, 1)."""
        # From the best block's probability, which is never small. Summing the exponentials again
        # would cost as much as the softmax.
        best_N1 = self.logits.argmax(dim=-1, keepdim=True)
        return at_least_fp32(self.logits.gather(1, best_N1)) - self.probs.gather(1, best_N1).log()

    def mean_probs(self, valid_N: Tensor | None) -> Tensor:
        """Return the probability of each block, averaged over the valid tokens: (B,)."""
        return mean_over_tokens(self.probs, valid_N)

    @property
    def probs(self) -> Tensor:
        """Probability of each block: (N, B), computed once for gate and losses."""
        if self._probs is None:
            self._probs = torch.softmax(at_least_fp32(self.logits), dim=-1)
        return self._probs


class ProductScores(Scores):
    """Scores that are sums of two parts, one for each half of the block number.

    The score of block l * R + r is left[l] + right[r] (Lample et al. 2019, arXiv 1907.05242,
    section 3.2). Only the best of the L * R scores are formed. Each of H heads scores all blocks.
    A token's blocks are the best of each head, then the second best of each head, and so on.

    Args:
        left: (N, H, L) scores of the first half.
        right: (N, H, R) scores of the second half.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.num_tokens, self.device = len(left), left.device
        self.num_blocks = left.shape[2] * right.shape[2]

    def top(self, active_blocks: int) -> Tensor:
        heads, right_size = self.left.shape[1], self.right.shape[2]
        each = active_blocks // heads
        left, lefts = _best(self.left, each)
        right, rights = _best(self.right, each)
        ranks_l, ranks_r = candidate_ranks(left.shape[1], right.shape[1], each, self.device)
        sums = left.index_select(1, ranks_l).add_(right.index_select(1, ranks_r))
        best = top_blocks(sums, each)
        blocks = lefts.gather(1, ranks_l[best]) * right_size + rights.gather(1, ranks_r[best])
        return blocks.unflatten(0, (-1, heads)).transpose(1, 2).flatten(1)

    def of(self, blocks_NA: Tensor) -> Tensor:
        blocks_NaH = self._by_rank(blocks_NA)
        right_size = self.right.shape[2]
        lefts = blocks_NaH.div(right_size, rounding_mode="floor")
        scores = self.left.transpose(1, 2).gather(1, lefts)
        return (scores + self.right.transpose(1, 2).gather(1, blocks_NaH % right_size)).flatten(1)

    def log_probs(self, blocks_NA: Tensor) -> Tensor:
        scores_NaH = self._by_rank(self.of(blocks_NA))
        return (scores_NaH - self.log_partition().unsqueeze(1)).flatten(1)

    def _by_rank(self, values_NA: Tensor) -> Tensor:
        return values_NA.unflatten(1, (-1, self.left.shape[1]))

    def log_partition(self) -> Tensor:
        """Return the log of the summed exponentials of the scores of each head: (N, H)."""
        left, right = at_least_fp32(self.left), at_least_fp32(self.right)
        return torch.logsumexp(left, dim=-1) + torch.logsumexp(right, dim=-1)

    def mean_probs(self, valid_N: Tensor | None) -> Tensor:
        """Return the probability of each block, averaged over heads and valid tokens: (B,)."""
        left = torch.softmax(at_least_fp32(self.left), dim=-1)
        right = torch.softmax(at_least_fp32(self.right), dim=-1)
        # The weights sum to 1 over tokens and heads, and are 0 at padding.
        weights_N = left.new_ones(len(left)) if valid_N is None else valid_N.to(left.dtype)
        weights_N = weights_N / (left.shape[1] * weights_N.sum().clamp(min=1))
        left = left * weights_N[:, None, None]
        with torch.autocast(left.device.type, enabled=False):
            return (left.flatten(0, 1).t() @ right.flatten(0, 1)).flatten()


def candidate_ranks(
    left_size: int, right_size: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Find the ranks whose sum can be among the ``count`` best sums of two sorted lists.

    At least (l + 1) * (r + 1) - 1 sums are better than the sum of ranks l and r. The two ranks are
    a candidate if (l + 1) * (r + 1) <= count.

    Args:
        left_size: length of the first list.
        right_size: length of the second list.
        count: number of best sums.
        device: device of the result.

    Returns:
        Ranks in the first list and in the second list, ordered by the first, then by the second:
        (candidates,) int64 each.
    """
    ranks_L = torch.arange(left_size, device=device)
    each_L = torch.full_like(ranks_L, count).div(ranks_L + 1, rounding_mode="floor")
    each_L = each_L.clamp(max=right_size)
    # The host computes the total: finding the candidates by `nonzero` would wait for the device.
    total = sum(min(count // (rank + 1), right_size) for rank in range(left_size))
    ranks_l = ranks_L.repeat_interleave(each_L, output_size=total)
    starts_L = each_L.cumsum(0) - each_L
    return ranks_l, torch.arange(total, device=device) - starts_L[ranks_l]


def _best(half_NHX: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the highest scores of a half and their indices, best first: (N * H, X) each."""
    flat = half_NHX.detach().flatten(0, 1)
    indices = top_blocks(flat, min(count, flat.shape[1]))
    return flat.gather(1, indices), indices


def top_blocks(scores_NB: Tensor, active_blocks: int) -> Tensor:
    """Return the blocks with the highest scores, best first: (N, A) int64.

    The order of equal scores is undefined.
    """
    scores_NB = scores_NB.detach()
    if (
        scores_NB.device.type != "cpu"
        or scores_NB.dtype not in NUMPY_DTYPES
        or scores_NB.shape[1] < PARTITIONED_BLOCKS
        or scores_NB.numel() < PARTITIONED_SCORES
        or active_blocks < PARTITIONED_ACTIVE
    ):
        return scores_NB.topk(active_blocks, dim=-1).indices
    # NumPy's sorts use vector instructions and are several times faster than PyTorch's.
    if active_blocks == scores_NB.shape[1]:
        return torch.from_numpy(scores_NB.numpy().argsort(axis=1)).flip(1)
    parted = np.argpartition(scores_NB.numpy(), -active_blocks, axis=1)
    blocks_NA = torch.from_numpy(parted[:, -active_blocks:])
    order_NA = torch.from_numpy(scores_NB.gather(1, blocks_NA).numpy().argsort(axis=1))
    return blocks_NA.gather(1, order_NA.flip(1))


def mean_over_tokens(values_NX: Tensor, valid_N: Tensor | None) -> Tensor:
    """Average over the valid tokens: (X,); zeros if there are none."""
    if valid_N is None:
        return values_NX.sum(dim=0) / max(len(values_NX), 1)
    weights_N = valid_N.to(values_NX.dtype) / valid_N.sum().clamp(min=1)
    with torch.autocast(values_NX.device.type, enabled=False):
        return weights_N @ values_NX


def at_least_fp32(scores: Tensor) -> Tensor:
    """Return the scores in fp32, or in their own dtype if it is wider."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
