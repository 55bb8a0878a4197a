"""Ways to compute the selected blocks, and which one runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..selection import Selection
from .bags import dot_rows, sum_rows
from .plan import make_plan
from .products import CACHED_PAIRS, PRODUCTS, Products
from .sorted_pairs import combine, score


class Tables(NamedTuple):
    """A memory's tables in one dtype: keys (B, G, D) and key bias (B, G), or ``None`` where there
    are none, and values (B, G, D)."""

    keys: Tensor | None
    key_bias: Tensor | None
    values: Tensor


class Engine(Protocol):
    """Computes sum over a token's selected blocks of weight * f(x . keys + bias) . values."""

    def supports(self, dtype: torch.dtype, embed_dim: int, block_size: int) -> bool:
        """Whether the engine can compute tables of this kind."""

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

    def supports(self, dtype: torch.dtype, embed_dim: int, block_size: int) -> bool:
        return self.products.supports(dtype, embed_dim, block_size)

    def compute(
        self,
        x_ND: Tensor,
        tables: Tables,
        selection: Selection,
        activation: Callable[[Tensor], Tensor],
        dropout: Callable[[Tensor], Tensor],
    ) -> Tensor:
        num_blocks, block_size, _ = tables.values.shape
        plan = make_plan(
            selection.blocks,
            num_blocks,
            self.products.chunk_pairs(x_ND.device, block_size),
            selection.kept,
        )
        if selection.coefficients is not None:
            hidden_PG = selection.coefficients.flatten()[plan.order].unsqueeze(1)
        elif selection.pre_activations is not None:
            hidden_PG = activation(selection.pre_activations.flatten(0, 1)[plan.order])
        else:
            assert tables.keys is not None
            pre_PG = score(x_ND, tables.keys, tables.key_bias, plan, self.products)
            hidden_PG = activation(pre_PG)
        hidden_PG = dropout(hidden_PG).to(x_ND.dtype)
        weights_P = None
        if selection.weights is not None:
            weights_P = selection.weights.flatten()[plan.order].to(x_ND.dtype)
        return combine(hidden_PG, weights_P, tables.values, plan, len(x_ND), self.products)


class Bags:
    """For blocks of one cell: each token sums a bag of rows, without sorting or gathering."""

    def supports(self, dtype: torch.dtype, embed_dim: int, block_size: int) -> bool:
        return block_size == 1

    def compute(
        self,
        x_ND: Tensor,
        tables: Tables,
        selection: Selection,
        activation: Callable[[Tensor], Tensor],
        dropout: Callable[[Tensor], Tensor],
    ) -> Tensor:
        if selection.coefficients is not None:
            hidden_NA = selection.coefficients
        elif selection.pre_activations is not None:
            hidden_NA = activation(selection.pre_activations.squeeze(2))
        else:
            assert tables.keys is not None
            pre_NA = dot_rows(x_ND, tables.keys.squeeze(1), selection.blocks)
            if tables.key_bias is not None:
                pre_NA = pre_NA + tables.key_bias.squeeze(1)[selection.blocks]
            hidden_NA = activation(pre_NA)
        hidden_NA = dropout(hidden_NA).to(x_ND.dtype)
        if selection.weights is not None:
            hidden_NA = hidden_NA * selection.weights.to(x_ND.dtype)
        if selection.kept is not None:
            hidden_NA = hidden_NA * selection.kept
        return sum_rows(hidden_NA, tables.values.squeeze(1), selection.blocks)


ENGINES: dict[str, Engine] = {
    **{name: SortedPairs(products) for name, products in PRODUCTS.items()},
    "bags": Bags(),
}


def choose_engine(num_pairs: int, dtype: torch.dtype, embed_dim: int, block_size: int) -> Engine:
    """The engine that is fastest for these sizes among those that support them.

    Args:
        num_pairs: (token, block) pairs to compute.
        dtype, embed_dim, block_size: of the tables.
    """
    if block_size == 1:
        return ENGINES["bags"]
    if num_pairs * block_size <= CACHED_PAIRS:
        return ENGINES["gathered"]
    if ENGINES["grouped"].supports(dtype, embed_dim, block_size):
        return ENGINES["grouped"]
    return ENGINES["loop"]
