"""Avg-K: the blocks whose mean key fits best."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MemoryConfig
from ..scores import Scores
from ..selection import Selection, SelectorInput
from .mean_keys import MeanKeys

EMA_DECAY = 0.99
"""Decay of the exponential moving average of hidden states, per micro-batch."""


class AvgK(MeanKeys):
    """Top-b blocks by x . mean(K_i) + mean(c_i), the mean pre-activation of block i.

    Liu et al. 2023 (arXiv 2305.13999). It has no parameters of its own.

    With ``center``, the running mean of the hidden states is subtracted before scoring. The part
    that all tokens have in common then favours no block.

    Attributes:
        hidden_totals: (D + 1,) exponentially decayed sum of the hidden states of past training
            tokens, and of their number; only with ``center``.
    """

    name = "avgk"

    @dataclass(frozen=True)
    class Config(MeanKeys.Config):
        center: bool = field(
            default=False,
            metadata={
                "help": "subtract the running mean of the training tokens' hidden states before "
                "scoring, so that their common part favours no block"
            },
        )

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.active_blocks = config.active_blocks
        self.hidden_totals: Tensor | None
        totals = torch.zeros(config.embed_dim + 1) if config.selector_options.center else None
        self.register_buffer("hidden_totals", totals)

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        return 64

    @classmethod
    def flops_per_token(cls, config: MemoryConfig) -> int:
        return 2 * config.num_blocks * config.embed_dim

    def forward(self, inputs: SelectorInput) -> Selection:
        keys_BD, bias_B = self.scored_keys(inputs)
        # With activation checkpointing only the second pass has gradients. Both select alike.
        learns = self.training and torch.is_grad_enabled()
        x_ND = inputs.x
        if self.hidden_totals is not None:
            x_ND = x_ND - self.hidden_mean().to(x_ND.dtype)
            if learns:
                self.update_hidden_mean(inputs)
        scores = Scores(F.linear(x_ND, keys_BD, bias_B))
        return Selection(inputs.top(scores, self.active_blocks), scores)

    def hidden_mean(self) -> Tensor:
        """Return the mean hidden state of past training tokens: (D,), zero before the first."""
        assert self.hidden_totals is not None
        sum_D, number_1 = self.hidden_totals.split([len(self.hidden_totals) - 1, 1])
        return sum_D / number_1.clamp(min=1)

    def update_hidden_mean(self, inputs: SelectorInput) -> None:
        """Update the running mean by the tokens of a micro-batch, over all ranks."""
        assert self.hidden_totals is not None
        x_ND = inputs.x.detach().to(self.hidden_totals.dtype)
        valid_N = x_ND.new_ones(len(x_ND)) if inputs.valid is None else inputs.valid.to(x_ND.dtype)
        # Not a matrix product, which autocast would compute in half precision.
        sum_D = x_ND.masked_fill(~valid_N.bool().unsqueeze(1), 0.0).sum(dim=0)
        totals = torch.cat([sum_D, valid_N.sum().unsqueeze(0)])
        totals = inputs.stack_over_tokens(totals).sum(dim=0)
        _keep_finite(self.hidden_totals, EMA_DECAY * self.hidden_totals + totals, totals)


def _keep_finite(state: Tensor, after: Tensor, seen: Tensor) -> None:
    """Assign the next value to a state, unless the micro-batch overflowed.

    fairseq skips the update of such a micro-batch. The state would never recover from it.

    Args:
        state: assigned in place.
        after: its next value.
        seen: sums over the micro-batch, not finite after an overflow.
    """
    state.copy_(torch.where(seen.isfinite().all(), after.to(state.dtype), state))
