"""The configuration of a sparse neural memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from .activations import ACTIVATIONS
from .selection import Selector, SelectorConfig
from .validation import check_config


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
        shared_blocks: blocks s that every token uses with weight 1 (Dai et al. 2024, arXiv
            2401.06066). The selector chooses the other b - s of the other B - s blocks; usage and
            balance loss are of these alone. With s = b = B the memory is a dense FFN.
        selector: name of a selector, for its default options, or an instance of its ``Config``,
            such as ``HashLayer.Config(table="balanced")``.
        gate: weight of a selected block, a name in :data:`.gate.GATES`: ``none``, ``softmax``,
            ``sigmoid`` or ``sqrt_softplus``, or ``renormalized``, ``sigmoid_renormalized`` or
            ``sqrt_softplus_renormalized``; ``None`` takes the selector's default.
        activation: ``relu``, ``gelu``, ``silu``, ``tanh``, or any elementwise function of a tensor.
        glu: ``silu`` or ``gelu`` for gated cells f(x . k + c) * (x . u + c') with a second key
            table ``up``, for selectors that use the memory's key table (Shazeer 2020, arXiv
            2002.05202). This f replaces ``activation``. ``None``: plain cells.
        bias: whether keys have a bias per cell, and the output a bias per feature.
        vocab_size: number of token ids, for selectors that read token ids.
        token_counts: number of occurrences of each token id in the training data, for balanced
            hash tables.
        activation_dropout: probability of dropping an activation f(x . k + c), or the product of
            a gated cell, in training.
        capacity_factor: in training, a block takes at most this many times its fair share of the
            (token, block) assignments, and the rest is dropped; 0 drops nothing.
        eval_capacity_factor: the same in evaluation.
        balance_rate: step of the biases that balance the load without a loss; 0: no biases (see
            :class:`.balancer.Balancer`).
        init_scale: factor of the initial tables. They are uniform in +-1/sqrt(d) (keys, up and
            their biases) and +-1/sqrt(k) (values and value bias), where k is ``active_cells``: the
            initialization of a dense FFN with k hidden units, for any ``num_cells``.
        value_lr_scale: factor of Adam's steps on the value table, which is stored divided by it.
            Lample et al. 2019 (arXiv 1907.05242) use a separate learning rate for the values.
        engine: name of the engine that computes the selected blocks (see :mod:`.compute`);
            ``None`` chooses by size.
        route_scale: factor of the weights of any gate but ``none`` (DeepSeek-V3: 2.5).

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
    glu: str | None = None
    bias: bool = True
    vocab_size: int | None = None
    token_counts: Sequence[int] | None = field(default=None, repr=False, compare=False)
    activation_dropout: float = 0.0
    capacity_factor: float = 0.0
    eval_capacity_factor: float = 0.0
    balance_rate: float = 0.0
    init_scale: float = 1.0
    value_lr_scale: float = 1.0
    engine: str | None = None
    route_scale: float = 1.0
    shared_blocks: int = 0

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def num_blocks(self) -> int:
        return self.num_cells // self.block_size

    @property
    def active_cells(self) -> int:
        """Cells k that a token uses: A * G."""
        return self.active_blocks * self.block_size

    @property
    def shared_cells(self) -> int:
        """Cells of the shared blocks."""
        return self.shared_blocks * self.block_size

    @property
    def routed_blocks(self) -> int:
        """Blocks that are not shared."""
        return self.num_blocks - self.shared_blocks

    @property
    def routed_cells(self) -> int:
        """Cells of the blocks that are not shared."""
        return self.num_cells - self.shared_cells

    @cached_property
    def routed(self) -> MemoryConfig:
        """The config of the blocks that are not shared, which the selector sees.

        Raises:
            ConfigError: the selector does not support them, or all blocks are shared.
        """
        if not self.shared_blocks:
            return self
        return replace(
            self,
            num_cells=self.routed_cells,
            active_blocks=self.active_blocks - self.shared_blocks,
            shared_blocks=0,
        )

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
        name = self.glu or self.activation
        return ACTIVATIONS[name] if isinstance(name, str) else name

    @property
    def num_tables(self) -> int:
        """Number of tables with a row per routed cell: values, and the memory's keys and ``up``."""
        return 1 + (self.selector_class.key_table == "full") + (self.glu is not None)

    def num_params(self) -> int:
        """Return the number of trained parameters, including the selector's."""
        keys = 1 + (self.glu is not None)  # of shared cells
        params = self.shared_cells * ((keys + 1) * self.embed_dim + keys * self.bias)
        params += self.num_tables * self.routed_cells * self.embed_dim
        if self.bias:
            params += (self.num_tables - 1) * self.routed_cells + self.embed_dim
        return params + self.selection_params()

    def selection_params(self) -> int:
        """Return the part of :meth:`num_params` that belongs to the selector."""
        return self.selector_class.num_params(self.routed) if self.routed_blocks else 0

    def active_params(self) -> int:
        """Return the number of parameters that one token uses, including the selector's."""
        inactive = self.num_cells - self.active_cells
        tables = self.num_tables - self.selector_class.scores_every_key
        biases = (tables - 1) * self.bias  # the values have none per cell
        return self.num_params() - inactive * (tables * self.embed_dim + biases)

    def flops_per_token(self) -> int:
        """Return the forward FLOPs of a token: selection and active cells.

        A multiply-add counts as 2. Avg-K's mean keys are left out: their cost is per pass, not per
        token.
        """
        routed = self.num_tables * (self.active_cells - self.shared_cells)
        shared = (2 + (self.glu is not None)) * self.shared_cells
        return self.selection_flops_per_token() + 2 * (routed + shared) * self.embed_dim

    def selection_flops_per_token(self) -> int:
        """Return the part of :meth:`flops_per_token` that selects the blocks."""
        return self.selector_class.flops_per_token(self.routed) if self.routed_blocks else 0
