"""Ways to compute the selected blocks, and which one runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..selection import Selection
from .bag_kernels import BAGS, BagKernels, RowOrder, pays_to_mask
from .bags import dot_rows, sum_rows
from .plan import make_plan
from .products import PRODUCTS, Products
from .sorted_pairs import combine, score
from .tiled_products import gathered_products, scattered_products
from .tiles import make_tiles, tile_rows


class Tables(NamedTuple):
    """A memory's tables in one dtype: keys (B, G, D) and key bias (B, G), or ``None`` where there
    are none, and values (B, G, D)."""

    keys: Tensor | None
    key_bias: Tensor | None
    values: Tensor


class Engine(Protocol):
    """Computes sum over a token's selected blocks of weight * f(x . keys + bias) . values."""

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        """Whether the engine can compute tables (B, G, D) of this kind."""

    def compute(
        self,
        x_ND: Tensor,
        tables: Tables,
        selection: Selection,
        activation: Callable[[Tensor], Tensor],
        dropout: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The memory's output without its bias: (N, D), in the dtype of the tables and x.

        Args:
            activation: f, elementwise.
            dropout: applied to what f gives, elementwise.
        """


@dataclass(frozen=True)
class SortedPairs:
    """(token, block) pairs sorted by block, and multiplied block by block."""

    products: Products

    def supports(
        self, device_type: str, dtype: torch.dtype, table_shape: tuple[int, int, int]
    ) -> bool:
        return self.products.supports(device_type, dtype, table_shape)

    def compute(
        self,
        x_ND: Tensor,
        tables: Tables,
        selection: Selection,
        activation: Callable[[Tensor], Tensor],
        dropout: Callable[[Tensor], Tensor],
    ) -> Tensor:
        order_P, plan = make_plan(
            selection.blocks, len(tables.values), CACHED_PAIRS, selection.kept
        )
        if selection.coefficients is not None:
            hidden_PG = selection.coefficients.flatten()[order_P].unsqueeze(1)
        elif selection.pre_activations is not None:
            hidden_PG = activation(selection.pre_activations.flatten(0, 1)[order_P])
        else:
            assert tables.keys is not None
            pre_PG = score(x_ND, tables.keys, tables.key_bias, plan, self.products)
            hidden_PG = activation(pre_PG)
        hidden_PG = dropout(hidden_PG).to(x_ND.dtype)
        weights_P = None
        if selection.weights is not None:
            weights_P = selection.weights.flatten()[order_P].to(x_ND.dtype)
        return combine(hidden_PG, weights_P, tables.values, plan, len(x_ND), self.products)


class Tiled:
    """Pairs sorted by block and multiplied tile by tile, without asking the device for anything:
    for accelerators."""

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
            if selection.kept is not None:  # what is dropped may not be finite
                dropped_NA = ~selection.kept
                dropped_NA = dropped_NA.view(dropped_NA.shape + (1,) * (values_NA.ndim - 2))
                values_NA = values_NA.masked_fill(dropped_NA, 0.0)
            return values_NA.flatten(0, 1).index_select(0, tiles.order_P)

        if selection.coefficients is not None:
            hidden_PG = in_order(selection.coefficients).unsqueeze(1)
        elif selection.pre_activations is not None:
            hidden_PG = activation(in_order(selection.pre_activations))
        else:
            assert tables.keys is not None
            hidden_PG = activation(gathered_products(x_ND, tables.keys, tables.key_bias, tiles))
        hidden_PG = dropout(hidden_PG).to(x_ND.dtype)
        if selection.weights is not None:
            hidden_PG = hidden_PG * in_order(selection.weights).to(x_ND.dtype).unsqueeze(1)
        return scattered_products(hidden_PG, tables.values, len(x_ND), tiles)


@dataclass(frozen=True)
class Bags:
    """Each token sums a bag of table rows, without sorting or gathering: for blocks of one cell,
    and for a few tokens, which then touch their own rows only."""

    kernels: BagKernels

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
        if selection.coefficients is not None:
            hidden_NK = selection.coefficients
        elif selection.pre_activations is not None:
            hidden_NK = activation(selection.pre_activations.flatten(1))
        else:
            assert tables.keys is not None
            keys_BGD, bias_BG = tables.keys, tables.key_bias
            hidden_NK = activation(
                dot_rows(x_ND, keys_BGD, bias_BG, blocks_NA, order, self.kernels)
            )
        hidden_NK = dropout(hidden_NK).to(x_ND.dtype)
        if selection.weights is not None or selection.kept is not None:
            hidden_NAG = hidden_NK.unflatten(1, (-1, tables.values.shape[1]))
            if selection.weights is not None:
                hidden_NAG = hidden_NAG * selection.weights.to(x_ND.dtype).unsqueeze(2)
            if selection.kept is not None:
                hidden_NAG = hidden_NAG.masked_fill(~selection.kept.unsqueeze(2), 0.0)
            hidden_NK = hidden_NAG.flatten(1)
        return sum_rows(hidden_NK, tables.values, blocks_NA, order, self.kernels)


ENGINES: dict[str, Engine] = {
    **{name: SortedPairs(products) for name, products in PRODUCTS.items()},
    **{name: Bags(kernels) for name, kernels in BAGS.items()},
    "tiled": Tiled(),
}

NATIVE = tuple(name for name in ENGINES if name.startswith("native_"))
"""Those that need the C++ kernels: on a CPU, in fp32 or fp64, if they can be compiled."""

CACHED_PAIRS = 4096
"""Pairs whose gathered rows fit a processor's cache, as measured; larger temporaries cost page
faults that outweigh the products."""

BAGGED_ELEMENTS = 2**16
"""Up to so many products of numbers a block, on a CPU, calling a matrix product costs more than it
saves, as measured."""

SMALL_BLOCK = 8
"""Blocks of fewer cells fill a small part of a matrix unit's tile."""


def choose_engine(
    device_type: str,
    dtype: torch.dtype,
    num_tokens: int,
    active_blocks: int,
    table_shape: tuple[int, int, int],
) -> Engine:
    """The engine that is fastest for these sizes among those that support them.

    Args:
        active_blocks: of each token.
        table_shape: (B, G, D).
    """
    num_blocks, block_size, width = table_shape
    num_pairs = num_tokens * active_blocks
    if device_type != "cpu":
        if block_size < SMALL_BLOCK and pays_to_mask(num_tokens, active_blocks, num_blocks):
            return ENGINES["masked"]
        return ENGINES["bags" if block_size == 1 else "tiled"]
    each = num_pairs / num_blocks
    few = each <= 1 or each * block_size * width <= BAGGED_ELEMENTS
    name = "bags" if block_size == 1 or few else "loop"
    native = ENGINES[f"native_{name}"]
    return native if native.supports(device_type, dtype, table_shape) else ENGINES[name]
