"""The configuration of a sparse neural memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .compute import ENGINES, NATIVE
from .gate import GATES
from .selection import Selector, SelectorConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": F.tanh,
}


TYPE_REASONS = {bool: "neither True nor False", int: "not a whole number", float: "not a number"}
"""Type of a selector's option -> the reason to refuse a value of another type."""


class ConfigError(ValueError):
    """A field of :class:`MemoryConfig` or of a selector's options is not supported.

    The message has field, value and reason in one line.

    Attributes:
        field: name of the field.
        value: its value.
        reason: why it is refused.
    """

    def __init__(self, field: str, value: object, reason: str):
        super().__init__(f"{field} {value}: {reason}")
        self.field, self.value, self.reason = field, value, reason


@dataclass(frozen=True)
class MemoryConfig:
    """The configuration of a :class:`~fairseq_sffn.memory.SparseMemory`.

    The memory has ``num_cells`` key-value pairs in ``num_cells / block_size`` blocks. A token uses
    ``active_blocks`` of them (Liu et al. 2023, arXiv 2305.13999).

    Args:
        embed_dim: model width d.
        num_cells: rows d_m of the key and value tables.
        block_size: cells g per block; divides ``num_cells``.
        active_blocks: blocks b per token; at most ``num_blocks``.
        selector: name of a selector, for its default options, or an instance of its ``Config``,
            such as ``HashLayer.Config(table="balanced")``.
        gate: weight of a selected block: ``none``, ``softmax``, ``renormalized`` or ``sigmoid``
            (see :mod:`.gate`); ``None`` takes the selector's default.
        activation: ``relu``, ``gelu``, ``silu``, ``tanh``, or any elementwise function of a tensor.
        bias: whether keys have a bias per cell, and the output a bias per feature.
        vocab_size: number of token ids, for selectors that read token ids.
        token_counts: number of occurrences of each token id in the training data, for balanced
            hash tables.
        activation_dropout: probability of dropping an activation f(x . k + c) in training.
        capacity_factor: in training, a block takes at most this many times its fair share of the
            (token, block) assignments, and the rest is dropped; 0 drops nothing.
        eval_capacity_factor: the same in evaluation.
        init_scale: factor of the initial tables. They are uniform in +-1/sqrt(d) (keys and key
            bias) and +-1/sqrt(k) (values and value bias), where k is ``active_cells``: the
            initialization of a dense FFN with k hidden units, for any ``num_cells``.
        value_lr_scale: factor of Adam's steps on the value table, which is stored divided by it.
            Lample et al. 2019 (arXiv 1907.05242) use a separate learning rate for the values.
        engine: name of the engine that computes the selected blocks (see :mod:`.compute`);
            ``None`` chooses by size.

    Raises:
        ConfigError: a field is out of range or contradicts another one.
    """

    embed_dim: int
    num_cells: int
    block_size: int
    active_blocks: int
    selector: str | SelectorConfig = "avgk"
    gate: str | None = None
    activation: str | Callable[[Tensor], Tensor] = "relu"
    bias: bool = True
    vocab_size: int | None = None
    token_counts: Sequence[int] | None = field(default=None, repr=False, compare=False)
    activation_dropout: float = 0.0
    capacity_factor: float = 0.0
    eval_capacity_factor: float = 0.0
    init_scale: float = 1.0
    value_lr_scale: float = 1.0
    engine: str | None = None

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_cells", "block_size", "active_blocks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(name, value, "is not a whole number")
            if value < 1:
                raise ConfigError(name, value, "must be at least 1")
        if self.num_cells % self.block_size:
            reason = f"does not divide the {self.num_cells} cells of the memory"
            raise ConfigError("block_size", self.block_size, reason)
        if self.active_blocks > self.num_blocks:
            reason = (
                f"is more than the {self.num_blocks} blocks that "
                f"{self.num_cells} cells in blocks of {self.block_size} make"
            )
            raise ConfigError("active_blocks", self.active_blocks, reason)
        if not isinstance(self.selector, (str, SelectorConfig)):
            raise ConfigError("selector", self.selector, "is no name and no selector's Config")
        if type(self.selector) is SelectorConfig:
            raise ConfigError("selector", self.selector, "is the Config of no selector")
        if isinstance(self.selector, str) and self.selector not in Selector.registry:
            known = ", ".join(sorted(Selector.registry))
            raise ConfigError("selector", self.selector, f"is none of {known}")
        if self.gate is not None and self.gate not in GATES:
            raise ConfigError("gate", self.gate, f"is none of {', '.join(GATES)}")
        if self.gate_name != "none" and not self.selector_class.scores_blocks:
            reason = f"{self.selector_class.name} gives blocks no score to weigh them by; use none"
            raise ConfigError("gate", self.gate, reason)
        if not isinstance(self.activation, str) and not callable(self.activation):
            raise ConfigError("activation", self.activation, "is no name and no function")
        if isinstance(self.activation, str) and self.activation not in ACTIVATIONS:
            raise ConfigError("activation", self.activation, f"is none of {', '.join(ACTIVATIONS)}")
        if self.context_tokens and self.vocab_size is None:
            reason = f"{self.selector_class.name} looks at token ids and needs to know how many"
            raise ConfigError("vocab_size", None, reason)
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ConfigError("vocab_size", self.vocab_size, "must be at least 1")
        for name in ("capacity_factor", "eval_capacity_factor"):
            if not 0 <= getattr(self, name) < math.inf:
                reason = "must be positive and finite, or 0 for dropless"
                raise ConfigError(name, getattr(self, name), reason)
        if not 0 <= self.activation_dropout < 1:
            reason = "must be at least 0 and below 1"
            raise ConfigError("activation_dropout", self.activation_dropout, reason)
        if self.engine is not None:
            if self.engine not in ENGINES:
                raise ConfigError("engine", self.engine, f"is none of {', '.join(ENGINES)}")
            shape = (self.num_blocks, self.block_size, self.embed_dim)
            if not ENGINES[self.engine].supports("cpu", torch.float32, shape):
                reason = f"cannot multiply blocks of {self.block_size} x {self.embed_dim}"
                if self.engine in NATIVE:
                    reason = "has no C++ kernels here: no compiler, or FAIRSEQ_SFFN_KERNELS=off"
                raise ConfigError("engine", self.engine, reason)
        for name in ("init_scale", "value_lr_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(name, getattr(self, name), "must be positive and finite")
        if not isinstance(self.bias, bool):
            raise ConfigError("bias", self.bias, "is neither True nor False")
        for name, kind in self.selector_options.plain_types().items():
            value = getattr(self.selector_options, name)
            if type(value) not in (kind, int if kind is float else kind):
                raise ConfigError(name, value, f"is {TYPE_REASONS[kind]}")
        for name, choices in self.selector_options.choices().items():
            if (value := getattr(self.selector_options, name)) not in choices:
                raise ConfigError(name, value, f"is none of {', '.join(choices)}")
        self.selector_class.validate(self)

    @property
    def num_blocks(self) -> int:
        return self.num_cells // self.block_size

    @property
    def active_cells(self) -> int:
        """Cells k that a token uses: A * G."""
        return self.active_blocks * self.block_size

    @property
    def selector_options(self) -> Any:
        """The selector's ``Config``."""
        if isinstance(self.selector, str):
            return Selector.registry[self.selector].Config()
        return self.selector

    @property
    def selector_class(self) -> type[Selector]:
        options: SelectorConfig = self.selector_options
        return options.selector_class

    @property
    def gate_name(self) -> str:
        return self.gate or self.selector_class.default_gate

    @property
    def context_tokens(self) -> int:
        """Number of trailing token ids that the selector reads."""
        return self.selector_class.context_tokens(self)

    @property
    def activation_fn(self) -> Callable[[Tensor], Tensor]:
        return ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation

    def num_params(self) -> int:
        """Return the number of trained parameters, including the selector's."""
        tables = 2 if self.selector_class.key_table == "full" else 1
        params = tables * self.num_cells * self.embed_dim
        if self.bias:
            params += (tables - 1) * self.num_cells + self.embed_dim
        return params + self.selector_class.num_params(self)

    def active_params(self) -> int:
        """Return the number of parameters that one token uses, including the selector's."""
        inactive = self.num_cells - self.active_cells
        params = self.num_params() - inactive * self.embed_dim
        if self.selector_class.key_table == "full" and not self.selector_class.scores_every_key:
            params -= inactive * (self.embed_dim + self.bias)
        return params

    def flops_per_token(self) -> int:
        """Return the forward FLOPs of a token: selection and active cells.

        A multiply-add counts as 2. Avg-K's mean keys are left out: their cost is per pass, not per
        token.
        """
        tables = 2 if self.selector_class.key_table == "full" else 1
        active = 2 * tables * self.active_cells * self.embed_dim
        return self.selection_flops_per_token() + active

    def selection_flops_per_token(self) -> int:
        """Return the part of :meth:`flops_per_token` that selects the blocks."""
        return self.selector_class.flops_per_token(self)
