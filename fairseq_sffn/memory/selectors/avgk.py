"""Avg-K: the blocks whose mean key fits best."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MemoryConfig
from ..scores import Scores
from ..selection import Selection, Selector, SelectorConfig, SelectorInput

State = list[tuple[Tensor, int]]


class AvgK(Selector):
    """Top-b blocks by x . mean(K_i) + mean(c_i), the mean pre-activation of block i.

    It adds no parameters: a block is scored by the keys it has (Liu et al. 2023, arXiv
    2305.13999). The mean keys are formed once per forward pass in training, and kept
    between passes in evaluation.
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

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.exclude_bias = config.selector_options.exclude_bias
        self.block_size, self.active_blocks = config.block_size, config.active_blocks
        # The tables that the mean keys are of, with their versions, and the mean keys.
        self._cache: tuple[State, tuple[Tensor, Tensor | None]] | None = None

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        return 64

    @classmethod
    def flops_per_token(cls, config: MemoryConfig) -> int:
        return 2 * config.num_blocks * config.embed_dim

    @classmethod
    def flops_per_step(cls, config: MemoryConfig) -> int:
        """To form the mean keys: an addition for each number in the key table."""
        return config.num_cells * config.embed_dim

    def forward(self, inputs: SelectorInput) -> Selection:
        assert inputs.keys is not None
        scores = Scores(F.linear(inputs.x, *self.mean_keys(inputs.keys, inputs.key_bias)))
        return Selection(scores.top(self.active_blocks), scores)

    def mean_keys(self, keys_CD: Tensor, key_bias_C: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mean key (B, D) and mean key bias (B,) of each block."""
        if self.training or torch.is_grad_enabled():
            self._cache = None
            return self._mean_keys(keys_CD, key_bias_C)
        tables = [table for table in (keys_CD, key_bias_C) if table is not None]
        if any(table.is_inference() for table in tables):  # they do not track changes
            return self._mean_keys(keys_CD, key_bias_C)
        state = [(table, table._version) for table in tables]
        if self._cache is None or not _same(self._cache[0], state):
            self._cache = state, self._mean_keys(keys_CD, key_bias_C)
        return self._cache[1]

    def _mean_keys(
        self, keys_CD: Tensor, key_bias_C: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        keys_BD = keys_CD.unflatten(0, (-1, self.block_size)).mean(dim=1)
        if key_bias_C is None or self.exclude_bias:
            return keys_BD, None
        return keys_BD, key_bias_C.unflatten(0, (-1, self.block_size)).mean(dim=1)

    # The version counter of a tensor does not tell all changes, since optimizers write through
    # `.data`; but they come with one of these.
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


def _same(left: State, right: State) -> bool:
    return len(left) == len(right) and all(
        table is other and version == now
        for (table, version), (other, now) in zip(left, right, strict=True)
    )
