"""Avg-K: the blocks whose mean key fits best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MemoryConfig
from ..scores import Scores
from ..selection import Selection, Selector, SelectorConfig, SelectorInput
from ..wide_buffers import WideBuffers

State = list[tuple[Tensor, int]]

EMA_DECAY = 0.99
"""Decay of the exponential moving average of hidden states, per micro-batch."""


class AvgK(WideBuffers, Selector):
    """Top-b blocks by x . mean(K_i) + mean(c_i), the mean pre-activation of block i.

    Liu et al. 2023 (arXiv 2305.13999). It has no parameters of its own. The mean keys are computed
    in each forward pass in training, and cached between passes in evaluation.

    With ``center``, the running mean of the hidden states is subtracted before scoring. The part
    that all tokens have in common then favours no block.

    Attributes:
        hidden_totals: (D + 1,) exponentially decayed sum of the hidden states of past training
            tokens, and of their number; only with ``center``.
    """

    name = "avgk"

    @dataclass(frozen=True)
    class Config(SelectorConfig):
        exclude_bias: bool = field(
            default=False,
            metadata={
                "help": "score blocks by the mean key alone, without the mean of the key biases "
                "(with it, the score is exactly the block's mean pre-activation)"
            },
        )
        center: bool = field(
            default=False,
            metadata={
                "help": "subtract the running mean of the training tokens' hidden states before "
                "scoring, so that their common part favours no block"
            },
        )

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.exclude_bias = config.selector_options.exclude_bias
        self.block_size, self.active_blocks = config.block_size, config.active_blocks
        self.hidden_totals: Tensor | None
        totals = torch.zeros(config.embed_dim + 1) if config.selector_options.center else None
        self.register_buffer("hidden_totals", totals)
        # The tables with their versions, and their mean keys.
        self._cache: tuple[State, tuple[Tensor, Tensor | None]] | None = None

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        return 64

    @classmethod
    def flops_per_token(cls, config: MemoryConfig) -> int:
        return 2 * config.num_blocks * config.embed_dim

    @classmethod
    def flops_per_step(cls, config: MemoryConfig) -> int:
        """Return the FLOPs of the mean keys: one addition per element of the key table."""
        return config.num_cells * config.embed_dim

    def forward(self, inputs: SelectorInput) -> Selection:
        assert inputs.keys is not None
        keys_BD, bias_B = self.mean_keys(inputs.keys, inputs.key_bias, inputs.gather)
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

    def mean_keys(
        self,
        keys_CD: Tensor,
        key_bias_C: Tensor | None,
        gather: Callable[[Tensor], Tensor] = lambda part: part,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mean key (B, D) and the mean key bias (B,) of each block.

        Args:
            keys_CD, key_bias_C: the key table and its bias.
            gather: see :class:`SelectorInput`.
        """

        def form() -> tuple[Tensor, Tensor | None]:
            keys_BD = gather(keys_CD.unflatten(0, (-1, self.block_size)).mean(dim=1))
            if key_bias_C is None or self.exclude_bias:
                return keys_BD, None
            return keys_BD, gather(key_bias_C.unflatten(0, (-1, self.block_size)).mean(dim=1))

        if self.training or torch.is_grad_enabled():
            self._cache = None
            return form()
        tables = [table for table in (keys_CD, key_bias_C) if table is not None]
        if any(table.is_inference() for table in tables):  # they have no version
            return form()
        state = [(table, table._version) for table in tables]
        if self._cache is None or not _same(self._cache[0], state):
            self._cache = state, form()
        return self._cache[1]

    # The version of a tensor misses writes through `.data`, as by optimizers. A call of one of
    # these methods comes between such a write and evaluation.
    def train(self, mode: bool = True) -> AvgK:
        self._cache = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> AvgK:
        self._cache = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}


def _keep_finite(state: Tensor, after: Tensor, seen: Tensor) -> None:
    """Assign the next value to a state, unless the micro-batch overflowed.

    fairseq skips the update of such a micro-batch. The state would never recover from it.

    Args:
        state: assigned in place.
        after: its next value.
        seen: sums over the micro-batch, not finite after an overflow.
    """
    state.copy_(torch.where(seen.isfinite().all(), after.to(state.dtype), state))


def _same(left: State, right: State) -> bool:
    return len(left) == len(right) and all(
        table is other and version == now
        for (table, version), (other, now) in zip(left, right, strict=True)
    )
