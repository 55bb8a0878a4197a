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


class AvgK(Selector):
    """Top-b blocks by x . mean(K_i) + mean(c_i), the mean pre-activation of block i.

    It adds no parameters: a block is scored by the keys it has (Liu et al. 2023, arXiv
    2305.13999, section 4). The mean keys are formed once per forward pass in training, and kept
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
        self._cache: tuple[Tensor, Tensor | None] | None = None

    @classmethod
    def default_block_size(cls, ffn_embed_dim: int) -> int:
        return 64

    @classmethod
    def flops_per_token(cls, config: MemoryConfig) -> int:
        return 2 * config.num_blocks * config.embed_dim

    def forward(self, inputs: SelectorInput) -> Selection:
        assert inputs.keys is not None
        scores = Scores(F.linear(inputs.x, *self.mean_keys(inputs.keys, inputs.key_bias)))
        return Selection(scores.top(self.active_blocks), scores)

    def mean_keys(self, keys_CD: Tensor, key_bias_C: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mean key (B, D) and mean key bias (B,) of each block."""
        if self.training or torch.is_grad_enabled():
            self._cache = None
            return self._mean_keys(keys_CD, key_bias_C)
        if self._cache is None:
            self._cache = self._mean_keys(keys_CD, key_bias_C)
        return self._cache

    def _mean_keys(
        self, keys_CD: Tensor, key_bias_C: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        keys_BD = keys_CD.unflatten(0, (-1, self.block_size)).mean(dim=1)
        if key_bias_C is None or self.exclude_bias:
            return keys_BD, None
        return keys_BD, key_bias_C.unflatten(0, (-1, self.block_size)).mean(dim=1)

    # The table can only change under a cache by one of these: the version counter of a tensor
    # does not tell, since optimizers write through `.data`.
    def train(self, mode: bool = True) -> AvgK:
        self._cache = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> AvgK:
        self._cache = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache = None
        super()._load_from_state_dict(*args, **kwargs)
