"""The engines that compute the selected blocks, and the choice of the one that runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..selection import Selection
from .chunks import chunk_assignments
from .embedding_bag import dot_rows, sum_rows
from .embedding_bag_kernels import EMBEDDING_BAGS, EmbeddingBagKernels, RowOrder, pays_to_mask
from .grouped_mm import GROUPED_MMS, GroupedMM
from .sorted_assignments import pre_activations, sum_values
from .tiled_products import gathered_products, scattered_products
from .tiles import make_tiles, tile_rows


class Tables(NamedTuple):
    """The tables of a memory in one dtype.

    Attributes:
        keys: (B, G, D), or ``None`` where the selector has its own keys or needs none.
        key_bias: (B, G), or ``None``.
        values: (B, G, D).
    """

    keys: Tensor | None
    key_bias: Tensor | None
    values: Tensor


class Engine(Protocol):
    """Computes sum over a token's selected blocks of weight * f(x . keys + bias) . values."""

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        """Return whether the engine can compute with tables of this dtype and shape (B, G, D)."""

    def compute(
        self,
        x_ND: Tensor,
        tables: Tables,
        selection: Selection,
        activation: Callable[[Tensor], Tensor],
        dropout: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Compute the output of the memory without its bias.

        Args:
            x_ND: hidden states, in the dtype of the tables.
            tables: keys, key bias and values.
            selection: the blocks of each token.
            activation: f, elementwise.
            dropout: applied to the result of f, elementwise.

        Returns:
            (N, D) in the dtype of the tables.
        """


@dataclass(frozen=True)
class SortedAssignments:
    """Sorts the assignments by block and multiplies block by block."""

    mm: GroupedMM

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        return self.mm.supports(device_type, dtype, table_shape)

    def compute(
        self,
        x_ND: Tensor,
        tables: Tables,
        selection: Selection,
        activation: Callable[[Tensor], Tensor],
        dropout: Callable[[Tensor], Tensor],
    ) -> Tensor:
        order_P, assignments = chunk_assignments(
            selection.blocks, len(tables.values), CACHED_ASSIGNMENTS, selection.kept
        )

        def in_order(values_NA: Tensor) -> Tensor:
            return values_NA.flatten(0, 1)[order_P]

        def pre_activations_PG() -> Tensor:
            assert tables.keys is not None
            return pre_activations(x_ND, tables.keys, tables.key_bias, assignments, self.mm)

        hidden_PG = _hidden(selection, activation, in_order, pre_activations_PG)
        hidden_PG = dropout(hidden_PG).to(x_ND.dtype)
        weights_P = None
        if selection.weights is not None:
            weights_P = in_order(selection.weights).to(x_ND.dtype)
        return sum_values(hidden_PG, weights_P, tables.values, assignments, len(x_ND), self.mm)


class Tiled:
    """Sorts the assignments by block and multiplies tile by tile, without a read from the device.

    It is the engine for accelerators.
    """

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        return True

    def compute(
        self,
        x_ND: Tensor,
        tables: Tables,
        selection: Selection,
        activation: Callable[[Tensor], Tensor],
        dropout: Callable[[Tensor], Tensor],
    ) -> Tensor:
        blocks_NA, num_blocks = selection.blocks, len(tables.values)
        num_kept = selection.num_kept
        rows = tile_rows(blocks_NA.numel() if num_kept is None else num_kept, num_blocks)
        tiles = make_tiles(blocks_NA, num_blocks, selection.kept, rows, num_kept)

        def in_order(values_NA: Tensor) -> Tensor:
            if selection.kept is not None:  # the values of dropped assignments may be infinite
                dropped_NA = ~selection.kept
                dropped_NA = dropped_NA.view(dropped_NA.shape + (1,) * (values_NA.ndim - 2))
                values_NA = values_NA.masked_fill(dropped_NA, 0.0)
            return values_NA.flatten(0, 1).index_select(0, tiles.order_P)

        def pre_activations_PG() -> Tensor:
            assert tables.keys is not None
            return gathered_products(x_ND, tables.keys, tables.key_bias, tiles)

        hidden_PG = _hidden(selection, activation, in_order, pre_activations_PG)
        hidden_PG = dropout(hidden_PG).to(x_ND.dtype)
        if selection.weights is not None:
            hidden_PG = hidden_PG * in_order(selection.weights).to(x_ND.dtype).unsqueeze(1)
        return scattered_products(hidden_PG, tables.values, len(x_ND), tiles)


@dataclass(frozen=True)
class EmbeddingBag:
    """Sums table rows for each token, without sorting or gathering.

    It is for blocks of one cell, and for few tokens, which then read only their own rows.
    """

    kernels: EmbeddingBagKernels

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        return self.kernels.supports(device_type, dtype)

    def compute(
        self,
        x_ND: Tensor,
        tables: Tables,
        selection: Selection,
        activation: Callable[[Tensor], Tensor],
        dropout: Callable[[Tensor], Tensor],
    ) -> Tensor:
        blocks_NA, order = selection.blocks, RowOrder()

        def in_order(values_NAG: Tensor) -> Tensor:
            return values_NAG.flatten(1)

        def pre_activations_NK() -> Tensor:
            assert tables.keys is not None
            keys_BGD, bias_BG = tables.keys, tables.key_bias
            return dot_rows(x_ND, keys_BGD, bias_BG, blocks_NA, order, self.kernels)

        hidden_NK = _hidden(selection, activation, in_order, pre_activations_NK)
        hidden_NK = dropout(hidden_NK).to(x_ND.dtype)
        if selection.weights is not None or selection.kept is not None:
            hidden_NAG = hidden_NK.unflatten(1, (-1, tables.values.shape[1]))
            if selection.weights is not None:
                hidden_NAG = hidden_NAG * selection.weights.to(x_ND.dtype).unsqueeze(2)
            if selection.kept is not None:
                hidden_NAG = hidden_NAG.masked_fill(~selection.kept.unsqueeze(2), 0.0)
            hidden_NK = hidden_NAG.flatten(1)
        return sum_rows(hidden_NK, tables.values, blocks_NA, order, self.kernels)


def _hidden(
    selection: Selection,
    activation: Callable[[Tensor], Tensor],
    in_order: Callable[[Tensor], Tensor],
    pre_activations: Callable[[], Tensor],
) -> Tensor:
    """Return the hidden activations, in the order and shape of the engine.

    Args:
        selection: may know coefficients or pre-activations.
        activation: f, elementwise.
        in_order: brings (N, A, G) into the order and shape of the engine.
        pre_activations: computes the pre-activations where the selection does not know them.
    """
    if selection.coefficients is not None:
        return in_order(selection.coefficients.unsqueeze(2))
    if selection.pre_activations is not None:
        return activation(in_order(selection.pre_activations))
    return activation(pre_activations())


ENGINES: dict[str, Engine] = {
    **{name: SortedAssignments(mm) for name, mm in GROUPED_MMS.items()},
    **{name: EmbeddingBag(kernels) for name, kernels in EMBEDDING_BAGS.items()},
    "tiled": Tiled(),
}

NATIVE = tuple(name for name in ENGINES if name.startswith("native_"))
"""Engines that need the C++ kernels: on a CPU, in fp32 or fp64, if these can be compiled."""

CACHED_ASSIGNMENTS = 4096
"""Number of assignments whose gathered rows fit in a processor's cache (measured). Page faults of
larger temporaries cost more than the matrix products."""

EMBEDDING_BAG_ELEMENTS = 2**16
"""Up to this many multiplications per block, a matrix product on a CPU costs more than it saves
(measured)."""

SMALL_BLOCK = 8
"""Blocks of fewer cells fill a small part of a matrix unit's tile."""


def choose_engine(
    device_type: str,
    dtype: torch.dtype,
    num_tokens: int,
    active_blocks: int,
    table_shape: tuple[int, int, int],
) -> Engine:
    """Return the fastest engine for these sizes among those that support them.

    ``torch.compile`` can trace ``tiled`` and ``masked`` only, so that it gets one of these.

    Args:
        device_type: ``cpu`` or an accelerator.
        dtype: of the tables.
        num_tokens: N.
        active_blocks: A.
        table_shape: (B, G, D).
    """
    num_blocks, block_size, width = table_shape
    on_cpu, compiling = device_type == "cpu", torch.compiler.is_compiling()
    if not on_cpu or compiling:
        small = block_size < SMALL_BLOCK and not on_cpu
        if small and pays_to_mask(num_tokens, active_blocks, num_blocks):
            return ENGINES["masked"]
        return ENGINES["embedding_bag" if block_size == 1 and not compiling else "tiled"]
    load = num_tokens * active_blocks / num_blocks
    few = load <= 1 or load * block_size * width <= EMBEDDING_BAG_ELEMENTS
    name = "embedding_bag" if block_size == 1 or few else "loop"
    native = ENGINES[f"native_{name}"]
    return native if native.supports(device_type, dtype, table_shape) else ENGINES[name]
