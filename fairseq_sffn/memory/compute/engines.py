"""Ways to compute the selected blocks, and which one runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..selection import Selection
from .bags import BAGS, BagKernels, RowOrder, dot_rows, sum_rows
from .plan import make_plan
from .products import PRODUCTS, Products
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
        if self.products.chunk_pairs(x_ND.device) is None:
            # Without chunks of pairs, so many tokens at a time that gathered rows stay bounded.
            active, width = selection.blocks.shape[1], x_ND.shape[1]
            each = max(1, GATHERED_ELEMENTS // max(1, active * width))
        else:
            each = max(1, len(x_ND))
        outputs = [
            self._compute(x_nD, tables, part, activation, dropout)
            for x_nD, part in zip(x_ND.split(each), selection.split(each), strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _compute(
        self,
        x_ND: Tensor,
        tables: Tables,
        selection: Selection,
        activation: Callable[[Tensor], Tensor],
        dropout: Callable[[Tensor], Tensor],
    ) -> Tensor:
        chunk_pairs = self.products.chunk_pairs(x_ND.device)
        # Without chunks, how many pairs are kept is known to the device alone: to multiply all is
        # faster than to ask it, unless they are many.
        planned_NA = selection.kept if chunk_pairs or selection.padded else None
        order_P, plan = make_plan(selection.blocks, len(tables.values), chunk_pairs, planned_NA)
        if selection.coefficients is not None:
            hidden_PG = selection.coefficients.flatten()[order_P].unsqueeze(1)
        elif selection.pre_activations is not None:
            hidden_PG = activation(selection.pre_activations.flatten(0, 1)[order_P])
        else:
            assert tables.keys is not None
            pre_PG = score(x_ND, tables.keys, tables.key_bias, plan, self.products)
            hidden_PG = activation(pre_PG)
        hidden_PG = dropout(hidden_PG).to(x_ND.dtype)
        if selection.kept is not None and planned_NA is None:
            dropped_P = ~selection.kept.flatten()[order_P]
            hidden_PG = hidden_PG.masked_fill(dropped_P.unsqueeze(1), 0.0)
        weights_P = None
        if selection.weights is not None:
            weights_P = selection.weights.flatten()[order_P].to(x_ND.dtype)
        return combine(hidden_PG, weights_P, tables.values, plan, len(x_ND), self.products)


@dataclass(frozen=True)
class Bags:
    """Each token sums a bag of table rows, without sorting or gathering: for blocks of one cell,
    and for a few tokens, which then touch their own rows only."""

    kernels: BagKernels

    def supports(self, dtype: torch.dtype, embed_dim: int, block_size: int) -> bool:
        return self.kernels.supports(dtype)

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
}

NATIVE = tuple(name for name in ENGINES if name.startswith("native_"))
"""Those that need the C++ kernels: on a CPU, in fp32 or fp64, if they can be compiled."""

GATHERED_ELEMENTS = 2**28
"""The most numbers in the gathered rows of one product on an accelerator."""

BAGGED_ELEMENTS = 2**16
"""Up to so many products of numbers a block, on a CPU, calling a matrix product costs more than it
saves, as measured."""


def choose_engine(
    device_type: str, dtype: torch.dtype, num_pairs: int, table_shape: tuple[int, int, int]
) -> Engine:
    """The engine that is fastest for these sizes among those that support them.

    Args:
        num_pairs: (token, block) pairs to compute.
        table_shape: (B, G, D).
    """
    num_blocks, block_size, width = table_shape
    each = num_pairs / num_blocks
    if device_type != "cpu":
        if block_size == 1:
            return ENGINES["bags"]
        able = ENGINES["grouped"].supports(dtype, width, block_size)
        return ENGINES["grouped" if able else "loop"]
    few = each <= 1 or each * block_size * width <= BAGGED_ELEMENTS
    name = "bags" if block_size == 1 or few else "loop"
    native = ENGINES[f"native_{name}"]
    return native if native.supports(dtype, width, block_size) else ENGINES[name]
