"""The base class of selectors that score blocks by their mean keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import MemoryConfig
from ..selection import Selector, SelectorConfig, SelectorInput
from ..validation import ConfigError
from ..wide_buffers import WideBuffers

State = list[tuple[Tensor, int]]

SHORTEST = 1e-12
"""Keys are divided by their length, or by this if they are shorter."""


class MeanKeys(WideBuffers, Selector):
    """The mean key and the mean key bias of each block.

    The mean keys are computed in each forward pass in training, and cached between passes in
    evaluation.

    The options are those of EMoE (Qiu et al. 2023, arXiv 2310.10908): keys of unit length, keys
    weighted by the lengths of their values, an exponential moving average of the mean keys, and,
    for gated cells, the second key table in place of the first.
    A cell's key and key bias have the same factor, so that a block's score stays a mean of its
    pre-activations. A moving average is a constant: no gradient reaches the keys.

    Attributes:
        key_average: (B, D) or, with key biases, (B, D + 1): the moving average of the mean keys and
            biases; only with ``key_ema``.
        key_updates: () number of updates of ``key_average``. Before the first one the mean keys
            themselves are used.
    """

    @dataclass(frozen=True)
    class Config(SelectorConfig):
        exclude_bias: bool = field(
            default=False,
            metadata={
                "help": "score blocks by the mean key alone, without the mean of the key biases "
                "(with it, the score is exactly the block's mean pre-activation)"
            },
        )
        normalize_keys: bool = field(
            default=False, metadata={"help": "scale keys to unit length before the mean"}
        )
        value_norm: bool = field(
            default=False,
            metadata={"help": "multiply keys by the lengths of their values before the mean"},
        )
        key_ema: float = field(
            default=0.0,
            metadata={
                "help": "score by the exponential moving average of the mean keys with this decay, "
                "updated after each micro-batch of training; 0: by the mean keys themselves"
            },
        )
        mean_of: Literal["keys", "up", "up_abs"] = field(
            default="keys",
            metadata={
                "help": "table whose rows and biases are averaged: the keys, or, for gated cells, "
                "the second key table (up) or its absolute values (up_abs)"
            },
        )

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        options = config.selector_options
        self.block_size, self.value_scale = config.block_size, config.value_lr_scale
        self.exclude_bias = options.exclude_bias
        self.normalize_keys, self.value_norm = options.normalize_keys, options.value_norm
        self.key_ema, self.mean_of = options.key_ema, options.mean_of
        columns = config.embed_dim + (config.bias and not self.exclude_bias)
        self.key_average: Tensor | None
        average = torch.zeros(config.num_blocks, columns) if self.key_ema else None
        self.register_buffer("key_average", average)
        self.key_updates: Tensor | None
        updates = torch.zeros((), dtype=torch.int64) if self.key_ema else None
        self.register_buffer("key_updates", updates)
        # The tables with their versions, and their mean keys.
        self._cache: tuple[State, tuple[Tensor, Tensor | None]] | None = None

    @classmethod
    def validate(cls, config: MemoryConfig) -> None:
        decay = config.selector_options.key_ema
        if not 0 <= decay < 1:
            raise ConfigError("key_ema", decay, "must be at least 0 and below 1")
        mean_of = config.selector_options.mean_of
        if mean_of != "keys" and config.glu is None:
            raise ConfigError(
                "mean_of", mean_of, "needs gated cells (MemoryConfig.glu or --sffn-glu)"
            )

    @classmethod
    def flops_per_step(cls, config: MemoryConfig) -> int:
        """Return the FLOPs of the mean keys.

        An element of the averaged table takes one addition, one multiplication if its cell has a
        factor, and a multiplication and an addition for the length of its key. An element of the
        value table takes the latter for the length of its value.
        """
        options = config.selector_options
        lengths = options.normalize_keys + options.value_norm
        return (1 + bool(lengths) + 2 * lengths) * config.num_cells * config.embed_dim

    def scored_keys(self, inputs: SelectorInput) -> tuple[Tensor, Tensor | None]:
        """Return the keys (B, D) and biases (B,) by which blocks are scored.

        In training they are the moving average before this micro-batch, which then updates it. With
        activation checkpointing only the second pass has gradients. Both passes use the same keys.
        """
        keys_BD, bias_B = self.mean_keys(inputs)
        if self.key_average is None or self.key_updates is None:
            return keys_BD, bias_B
        parts = [keys_BD] if bias_B is None else [keys_BD, bias_B.unsqueeze(1)]
        current = torch.cat(parts, dim=1).detach().to(self.key_average.dtype)
        before = self.key_average.where(self.key_updates > 0, current)
        if self.training and torch.is_grad_enabled():
            self.key_average.copy_(self.key_ema * before + (1 - self.key_ema) * current)
            self.key_updates += 1
        before = before.to(keys_BD.dtype)
        width = keys_BD.shape[1]
        return before[:, :width], None if bias_B is None else before[:, width]

    def mean_keys(self, inputs: SelectorInput) -> tuple[Tensor, Tensor | None]:
        """Return the mean key (B, D) and the mean key bias (B,) of each block.

        Args:
            inputs: its tables are read.
        """
        keys_CD, bias_C = inputs.keys, inputs.key_bias
        if self.mean_of != "keys":
            keys_CD, bias_C = inputs.up, inputs.up_bias
        assert keys_CD is not None
        bias_C = None if self.exclude_bias else bias_C
        values_CD = inputs.values if self.value_norm else None

        def form() -> tuple[Tensor, Tensor | None]:
            factors_C = self._factors(keys_CD, values_CD)

            def mean(table: Tensor) -> Tensor:
                if self.mean_of == "up_abs":
                    table = table.abs()
                if factors_C is not None:
                    table = table * factors_C.view(-1, *[1] * (table.ndim - 1))
                return inputs.gather(table.unflatten(0, (-1, self.block_size)).mean(dim=1))

            return mean(keys_CD), None if bias_C is None else mean(bias_C)

        if self.training or torch.is_grad_enabled():
            self._cache = None
            return form()
        used = [table for table in (keys_CD, bias_C, values_CD) if table is not None]
        if any(table.is_inference() for table in used):  # they have no version
            return form()
        state = [(table, table._version) for table in used]
        if self._cache is None or not _same(self._cache[0], state):
            self._cache = state, form()
        return self._cache[1]

    def _factors(self, keys_CD: Tensor, values_CD: Tensor | None) -> Tensor | None:
        """Return the factor of each cell's key and bias: (C,); ``None``: all are 1."""
        factors_C = None
        if self.normalize_keys:
            lengths_C = torch.linalg.vector_norm(keys_CD, dim=1)
            factors_C = lengths_C.clamp(min=SHORTEST).reciprocal()
        if self.value_norm:
            assert values_CD is not None
            lengths_C = self.value_scale * torch.linalg.vector_norm(values_CD, dim=1)
            factors_C = lengths_C if factors_C is None else factors_C * lengths_C
        return factors_C

    # The version of a tensor misses writes through `.data`, as by optimizers. A call of one of
    # these methods comes between such a write and evaluation.
    def train(self, mode: bool = True) -> MeanKeys:
        self._cache = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> MeanKeys:
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
