"""Scores that are sums of two halves, as product keys give them."""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import (
    Scores,
    Split,
    at_least_fp32,
    max_entropy,
    one_sequence,
    token_moments,
    token_weights,
)
from .top_blocks import top_blocks

SCORED_AT_ONCE = 2**22
"""Number of scores formed at a time, if they are sums that are not kept."""


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
        # Not `cached_property`, whose lock does not compile.
        self._wide: tuple[Tensor, Tensor] | None = None
        self._probs: tuple[Tensor, Tensor] | None = None
        self._log_partition: Tensor | None = None

    def top(
        self, active_blocks: int, bias_B: Tensor | None = None, function: str = "logits"
    ) -> Tensor:
        heads, right_size = self.left.shape[1], self.right.shape[2]
        each = active_blocks // heads
        if bias_B is not None:
            return self._top_with_bias(each, bias_B, function)
        left, lefts = _best(self.left, each)
        right, rights = _best(self.right, each)
        ranks_l, ranks_r = candidate_ranks(left.shape[1], right.shape[1], each, self.device)
        sums = left.index_select(1, ranks_l).add_(right.index_select(1, ranks_r))
        best = top_blocks(sums, each)
        blocks = lefts.gather(1, ranks_l[best]) * right_size + rights.gather(1, ranks_r[best])
        return blocks.unflatten(0, (-1, heads)).transpose(1, 2).flatten(1)

    def _top_with_bias(self, each: int, bias_B: Tensor, function: str) -> Tensor:
        """Select from all scores, a few tokens at a time: a bias is no sum of two halves."""
        best = []
        tokens = max(1, SCORED_AT_ONCE // (self.left.shape[1] * self.num_blocks))
        for left, right in zip(
            self.left.detach().split(tokens), self.right.detach().split(tokens), strict=True
        ):
            sums_hB = (left.unsqueeze(3) + right.unsqueeze(2)).flatten(2).flatten(0, 1)
            best.append(Scores(sums_hB).top(each, bias_B, function).unflatten(0, (len(left), -1)))
        return torch.cat(best).transpose(1, 2).flatten(1)

    def of(self, blocks_NA: Tensor) -> Tensor:
        left_NaH, right_NaH = self._of_blocks(self.left, self.right, blocks_NA)
        return (left_NaH + right_NaH).flatten(1)

    def _of_blocks(
        self, left_NHL: Tensor, right_NHR: Tensor, blocks_NA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the values that the halves of the given blocks have: (N, A / H, H) each."""
        blocks_NaH, right_size = self._by_rank(blocks_NA), right_NHR.shape[2]
        lefts_NaH = blocks_NaH.div(right_size, rounding_mode="floor")
        left_NaH = left_NHL.transpose(1, 2).gather(1, lefts_NaH)
        return left_NaH, right_NHR.transpose(1, 2).gather(1, blocks_NaH % right_size)

    def log_probs(self, blocks_NA: Tensor) -> Tensor:
        scores_NaH = self._by_rank(self.of(blocks_NA))
        return (scores_NaH - self.log_partition().unsqueeze(1)).flatten(1)

    def _by_rank(self, values_NA: Tensor) -> Tensor:
        return values_NA.unflatten(1, (-1, self.left.shape[1]))

    def log_partition(self) -> Tensor:
        """Return the log of the summed exponentials of the scores of each head: (N, H)."""
        if self._log_partition is None:
            left, right = (torch.logsumexp(half, dim=-1) for half in self._wide_halves())
            self._log_partition = left + right
        return self._log_partition

    def mean_shares(
        self, valid_N: Tensor | None, function: str = "softmax", split: Split = one_sequence
    ) -> Tensor:
        """Return the probability of each block, averaged over heads and valid tokens: (S, B).

        It is the softmax of the scores for any ``function``: only its sum over all cells is a
        product of two sums.
        """
        left, right = self._half_probs()
        # The weights sum to 1 over tokens and heads of a sequence, and are 0 at padding.
        weights_ST = token_weights(left, valid_N, split) / left.shape[1]
        left_SThL = split(left) * weights_ST[:, :, None, None]
        with torch.autocast(left.device.type, enabled=False):
            return (left_SThL.flatten(1, 2).mT @ split(right).flatten(1, 2)).flatten(1)

    def mass(self, blocks_NA: Tensor, function: str = "softmax") -> Tensor:
        """Return the probability that the given blocks have, averaged over heads: (N,)."""
        left_NaH, right_NaH = self._of_blocks(*self._half_probs(), blocks_NA)
        return (left_NaH * right_NaH).sum(dim=(1, 2)) / self.left.shape[1]

    def entropy(self, function: str = "softmax") -> Tensor:
        """Return the entropy of a token's probabilities over its maximum, averaged over heads."""
        entropy_NHX = torch.special.entr(torch.cat(self._half_probs(), dim=2))
        return entropy_NHX.sum(dim=(1, 2)) / (self.left.shape[1] * max_entropy(self.num_blocks))

    def moments(self, valid_N: Tensor | None) -> Tensor:
        """Return the number, the sum and the sum of squares of the scores, averaged over heads."""
        left, right = self.left.detach().double(), self.right.detach().double()
        lefts, rights = left.sum(dim=2), right.sum(dim=2)
        sums_NH = lefts * right.shape[2] + rights * left.shape[2]
        squares_NH = 2 * lefts * rights
        squares_NH += left.square().sum(dim=2) * right.shape[2]
        squares_NH += right.square().sum(dim=2) * left.shape[2]
        return token_moments(sums_NH.mean(dim=1), squares_NH.mean(dim=1), self, valid_N)

    def _wide_halves(self) -> tuple[Tensor, Tensor]:
        if self._wide is None:
            self._wide = at_least_fp32(self.left), at_least_fp32(self.right)
        return self._wide

    def _half_probs(self) -> tuple[Tensor, Tensor]:
        if self._probs is None:
            left, right = self._wide_halves()
            self._probs = torch.softmax(left, dim=-1), torch.softmax(right, dim=-1)
        return self._probs


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
