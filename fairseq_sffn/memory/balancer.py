"""The load of an update, and biases that balance it without a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .scores import Scores
from .wide_buffers import WideBuffers


class Balancer(WideBuffers):
    """Counts the assignments of an optimizer update, and moves the blocks' biases after it.

    With a rate, a block whose load is below the mean becomes more attractive, and the others less
    (Wang et al. 2024, arXiv 2408.15664)::

        bias_i += rate * sign(mean load - load_i)

    The loads are those of all micro-batches and ranks of the update. The bias affects selection
    alone: gates and losses read the scores without it. The unit of the rate is that of the score
    function. Without a gate the scores are logits, which have any scale: the unit is then their
    standard deviation in the update.

    Args:
        num_blocks: B.
        rate: see above; 0: no biases.
        function: the score function of the gate; see :meth:`.scores.Scores.top`.

    Attributes:
        bias: (B,) added to the scores for selection, in fp32 at least, or ``None``.
        loads: (B,) int64 assignments of the update so far, on this rank.
        loss_counts: (B,) the same for the assignments that the balance loss counts.
        moments: (3,) number, sum and sum of squares of the logits of the update so far.
    """

    loads: Tensor
    loss_counts: Tensor
    moments: Tensor

    def __init__(self, num_blocks: int, rate: float, function: str) -> None:
        super().__init__()
        self.rate, self.function = rate, function
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(num_blocks) if rate else None)
        counts_B = torch.zeros(num_blocks, dtype=torch.int64)
        self.register_buffer("loads", counts_B, persistent=False)
        self.register_buffer("loss_counts", counts_B.clone(), persistent=False)
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64), persistent=False)

    @property
    def needs_moments(self) -> bool:
        """Whether the next step needs the moments of the logits."""
        return self.bias is not None and self.function == "logits" and self.training

    @torch.no_grad()
    def count(self, counts_B: Tensor, scores: Scores | None, valid_N: Tensor | None) -> None:
        """Add the assignments of a micro-batch.

        Args:
            counts_B: assignments of each block.
            scores: of the selection; read if :attr:`needs_moments`.
            valid_N: bool, ``False`` at padding; ``None``: no padding.
        """
        self.loads += counts_B
        if self.needs_moments:
            assert scores is not None
            self.moments += scores.moments(valid_N)

    def discard(self) -> None:
        """Forget the assignments since the last update."""
        for counts in (self.loads, self.loss_counts, self.moments):
            counts.zero_()

    @torch.no_grad()
    def step(self, stack_over_tokens: Callable[[Tensor], Tensor]) -> None:
        """Move the biases by the assignments since the last update, and forget them.

        A micro-batch whose logits are not finite moves nothing: the bias would never recover.

        Args:
            stack_over_tokens: stacks the tensors of the ranks that share tokens.
        """
        if self.bias is not None:
            own = torch.cat([self.loads.double(), self.moments.double()])
            totals = stack_over_tokens(own).sum(dim=0)
            loads_B, (number, first, second) = totals.split([len(self.loads), 3])
            step_B = self.rate * (loads_B.mean() - loads_B).sign()
            if self.function == "logits":
                number = number.clamp(min=1)
                variance = (second / number - (first / number) ** 2).clamp(min=0)
                step_B = step_B * variance.sqrt()
            step_B = step_B.where(step_B.isfinite(), 0.0)
            self.bias += step_B.to(self.bias.dtype)
        self.discard()
