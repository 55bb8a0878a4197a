"""The engines that compute the selected blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..selection import Selection
from .chunks import chunk_assignments
from .embedding_bag import dot_rows, sum_rows
from .embedding_bag_kernels import EMBEDDING_BAGS, EmbeddingBagKernels, RowOrder
from .grouped_mm import GROUPED_MMS, GroupedMM
from .sorted_assignments import pre_activations, sum_values
from .tiled_products import gathered_products, scattered_products
from .tiles import make_tiles, tile_rows

Table = tuple[Tensor, Tensor | None]
"""A key table (B, G, D) and its bias (B, G), or ``None``."""


class Tables(NamedTuple):
    """The tables of a memory in one dtype.

    Attributes:
        keys: (B, G, D), or ``None`` where the selector has its own keys or needs none.
        key_bias: (B, G), or ``None``.
        values: (B, G, D).
        up: (B, G, D) second key table of gated cells; ``None``: cells are not gated.
        up_bias: (B, G), or ``None``.
    """

    keys: Tensor | None
    key_bias: Tensor | None
    values: Tensor
    up: Tensor | None = None
    up_bias: Tensor | None = None


class Engine(Protocol):
    """Computes sum over a token's selected blocks of weight * f(x . keys + bias) . values.

    Gated cells multiply f(x . keys + bias) by x . up + up bias (Shazeer 2020, arXiv 2002.05202).
    """

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
            tables: keys, values and, for gated cells, up, with their biases.
            selection: the blocks of each token.
            activation: f, elementwise.
            dropout: applied to the hidden activations, elementwise.

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

        def products(*tables: Table) -> Iterable[Tensor]:
            return pre_activations(x_ND, tables, assignments, self.mm)

        hidden_PG = _hidden(tables, selection, activation, in_order, products)
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

        def products(*tables: Table) -> Iterable[Tensor]:
            return (gathered_products(x_ND, *table, tiles) for table in tables)

        hidden_PG = _hidden(tables, selection, activation, in_order, products)
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

        def products(*tables: Table) -> Iterable[Tensor]:
            return (dot_rows(x_ND, *table, blocks_NA, order, self.kernels) for table in tables)

        hidden_NK = _hidden(tables, selection, activation, in_order, products)
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
    tables: Tables,
    selection: Selection,
    activation: Callable[[Tensor], Tensor],
    in_order: Callable[[Tensor], Tensor],
    products: Callable[..., Iterable[Tensor]],
) -> Tensor:
    """Return the hidden activations, in the order and shape of the engine.

    Args:
        tables: keys and, for gated cells, up.
        selection: may know coefficients or pre-activations.
        activation: f, elementwise.
        in_order: brings (N, A, G) into the order and shape of the engine.
        products: computes x . row + bias for the cells of the assignments, for each of the given
            tables.
    """
    if selection.coefficients is not None:
        return in_order(selection.coefficients.unsqueeze(2))
    up = [] if tables.up is None else [(tables.up, tables.up_bias)]
    if selection.pre_activations is not None:
        pre, factors = in_order(selection.pre_activations), list(products(*up)) if up else []
    else:
        assert tables.keys is not None
        pre, *factors = products((tables.keys, tables.key_bias), *up)
    hidden = activation(pre)
    return hidden * factors[0] if factors else hidden


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
