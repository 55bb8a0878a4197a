"""Scores of blocks: one logit for each token and block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .top_blocks import top_blocks

ROUNDED = 40.0
"""Above this x, softplus(-x) and exp(-x) are the same number in fp64."""


def sqrt_softplus(logits: Tensor) -> Tensor:
    """Return the square root of log(1 + exp(logit)), elementwise."""
    return _SqrtSoftplus.apply(logits)


class _SqrtSoftplus(torch.autograd.Function):
    """Fewer kernels than by autograd, whose gradients need clamped logits to stay finite."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        # For very negative logits softplus is 0 in fp32.
        large = F.softplus(logits, threshold=ROUNDED).sqrt_()
        roots = torch.where(logits < -ROUNDED, torch.exp(logits / 2), large)
        ctx.save_for_backward(logits, roots)
        return roots

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        logits, roots = ctx.saved_tensors
        twice = torch.where(logits < -ROUNDED, roots, logits.sigmoid().div_(roots))
        return twice.mul_(grad).div_(2)


def normalized(scores_NX: Tensor) -> Tensor:
    """Divide the scores of each token by their sum: (N, X)."""
    return _Normalized.apply(scores_NX)


class _Normalized(torch.autograd.Function):
    """Half the kernels of a sum and a division by autograd."""

    @staticmethod
    def forward(ctx: Any, scores_NX: Tensor) -> Tensor:
        sums_N1 = scores_NX.sum(dim=1, keepdim=True).add_(EPSILON)
        shares_NX = scores_NX / sums_N1
        ctx.save_for_backward(shares_NX, sums_N1)
        return shares_NX

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NX: Tensor) -> Tensor:
        shares_NX, sums_N1 = ctx.saved_tensors
        mean_N1 = (grad_NX * shares_NX).sum(dim=1, keepdim=True)
        return (grad_NX - mean_N1).div_(sums_N1)


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": sqrt_softplus,
}
"""Score function -> function of a logit alone. The score function ``softmax`` is the only other
one: it is over all blocks."""

EPSILON = 1e-20
"""Added to a sum of scores before division (DeepSeek-AI 2024, arXiv 2412.19437)."""

Split = Callable[[Tensor], Tensor]
"""Gives the tokens of a batch by sequence: (N, ...) -> (S, T, ...)."""


def one_sequence(values: Tensor) -> Tensor:
    """Take all tokens as one sequence: (N, ...) -> (1, N, ...)."""
    return values.unsqueeze(0)


class Scores:
    """One logit for each token and block, and the softmax over blocks.

    Args:
        logits: (N, B), higher is better.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.num_tokens, self.num_blocks = logits.shape
        self.device = logits.device
        self._shares: dict[str, Tensor] = {}

    def top(
        self, active_blocks: int, bias_B: Tensor | None = None, function: str = "logits"
    ) -> Tensor:
        """Return the blocks with the highest scores, best first: (N, A) int64.

        Args:
            active_blocks: A.
            bias_B: added to the scores.
            function: the score function: ``logits``, ``softmax``, ``sigmoid`` or ``sqrt_softplus``.
                All give the same blocks without a bias.
        """
        if bias_B is None:
            return top_blocks(self.logits, active_blocks)
        if function == "softmax":
            scores_NB = self.probs.detach()
        else:
            scores_NB = ELEMENTWISE[function](at_least_fp32(self.logits.detach()))
        # A selector may rule out a block by an infinite logit.
        biased_NB = (scores_NB + bias_B).masked_fill(self.logits == -torch.inf, -torch.inf)
        return top_blocks(biased_NB, active_blocks)

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

    def mean_shares(
        self, valid_N: Tensor | None, function: str = "softmax", split: Split = one_sequence
    ) -> Tensor:
        """Return each block's share of a token's scores, averaged over the valid tokens: (S, B).

        Args:
            valid_N: bool, ``False`` at padding; ``None``: no padding.
            function: the score function. The shares of ``logits`` are those of ``softmax``.
            split: see :data:`Split`.
        """
        return mean_over_tokens(self.shares(function), valid_N, split)

    def shares(self, function: str = "softmax") -> Tensor:
        """Return each block's share of a token's scores, in fp32 at least: (N, B).

        They are computed once for gate, losses and statistics.
        """
        function = "softmax" if function == "logits" else function
        if function not in self._shares:
            logits_NB = at_least_fp32(self.logits)
            if function == "softmax":
                self._shares[function] = torch.softmax(logits_NB, dim=1)
            else:
                self._shares[function] = normalized(ELEMENTWISE[function](logits_NB))
        return self._shares[function]

    def mass(self, blocks_NA: Tensor, function: str = "softmax") -> Tensor:
        """Return the share of a token's scores that the given blocks have: (N,)."""
        return self.shares(function).gather(1, blocks_NA).sum(dim=1)

    def entropy(self, function: str = "softmax") -> Tensor:
        """Return the entropy of a token's shares over its maximum, log B: (N,)."""
        return torch.special.entr(self.shares(function)).sum(dim=1) / max_entropy(self.num_blocks)

    def moments(self, valid_N: Tensor | None) -> Tensor:
        """Return the number, the sum and the sum of squares of the logits: (3,) fp64.

        Args:
            valid_N: bool, ``False`` at padding, which does not count.
        """
        logits_NB = self.logits.detach().double()
        return token_moments(logits_NB.sum(dim=1), logits_NB.square().sum(dim=1), self, valid_N)

    @property
    def probs(self) -> Tensor:
        """Probability of each block: (N, B)."""
        return self.shares("softmax")


def mean_over_tokens(
    values_NX: Tensor, valid_N: Tensor | None, split: Split = one_sequence
) -> Tensor:
    """Average over the valid tokens of each sequence: (S, X); zeros where there are none."""
    values_STX = split(values_NX)
    if valid_N is None:
        # Not `mean`, whose gradient is divided element by element.
        return values_STX.sum(dim=1) / max(values_STX.shape[1], 1)
    weights_ST = token_weights(values_NX, valid_N, split)
    with torch.autocast(values_NX.device.type, enabled=False):
        return (weights_ST.unsqueeze(1) @ values_STX).squeeze(1)


def token_weights(like_N: Tensor, valid_N: Tensor | None, split: Split) -> Tensor:
    """Return weights of the tokens that sum to 1 in each sequence, and are 0 at padding: (S, T)."""
    weights_N = like_N.new_ones(len(like_N)) if valid_N is None else valid_N.to(like_N.dtype)
    weights_ST = split(weights_N)
    return weights_ST / weights_ST.sum(dim=1, keepdim=True).clamp(min=1)


def token_moments(
    sums_N: Tensor, squares_N: Tensor, scores: Scores, valid_N: Tensor | None
) -> Tensor:
    """Add up the sums and the squares of each token's logits: (3,), their number first."""
    rows_N3 = torch.stack([torch.full_like(sums_N, scores.num_blocks), sums_N, squares_N], dim=1)
    if valid_N is not None:
        rows_N3 = rows_N3.masked_fill(~valid_N.unsqueeze(1), 0.0)
    return rows_N3.sum(dim=0)


def max_entropy(num_blocks: int) -> float:
    """Return the entropy of even shares."""
    return math.log(max(num_blocks, 2))


def at_least_fp32(scores: Tensor) -> Tensor:
    """Return the scores in fp32, or in their own dtype if it is wider."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
