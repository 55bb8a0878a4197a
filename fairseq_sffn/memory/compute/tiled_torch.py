"""The operators of :mod:`.tiled_products` in batched matrix products of PyTorch.

They run on any device and in any dtype, with few launches for any number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import Tiles

ELEMENTS_AT_ONCE = 2**27
"""Approximate number of elements in the tables and rows of the tiles of one batch."""


class _Batch(NamedTuple):
    """Tiles that are multiplied together, M rows each.

    Attributes:
        blocks_T: block of each tile; arbitrary for unused tiles.
        rows_TM: sorted assignment of each row; P for empty rows.
        tokens_TM: token of each row; arbitrary for empty rows.
        empty_TM1: ``True`` for rows without an assignment.
    """

    blocks_T: Tensor
    rows_TM: Tensor
    tokens_TM: Tensor
    empty_TM1: Tensor


def gathered_products(
    x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, tiles: Tiles
) -> Tensor:
    """Implement :func:`.tiled_products.gathered_products`."""
    num_assignments, block_size = len(tiles.order_P), table_BGD.shape[1]
    out_PG = x_ND.new_zeros(num_assignments + 1, block_size)
    for batch in _batches(tiles, table_BGD.shape):
        table_TGD = table_BGD.index_select(0, batch.blocks_T)
        rows_TMD, columns_TDG = x_ND[batch.tokens_TM], table_TGD.transpose(1, 2)
        if bias_BG is None:
            products_TMG = rows_TMD @ columns_TDG
        else:
            # Added before the product is rounded to half precision.
            bias_T1G = bias_BG.index_select(0, batch.blocks_T).unsqueeze(1)
            products_TMG = torch.baddbmm(bias_T1G, rows_TMD, columns_TDG)
        # Empty rows are written to an extra row at the end.
        out_PG[batch.rows_TM.flatten()] = products_TMG.flatten(0, 1)
    return out_PG.resize_(
        num_assignments, block_size
    )  # not a view, which in-place activations could not change


def scattered_products(rows_PG: Tensor, table_BGD: Tensor, num_tokens: int, tiles: Tiles) -> Tensor:
    """Implement :func:`.tiled_products.scattered_products`."""
    wide = torch.promote_types(rows_PG.dtype, torch.float32)
    out_ND = rows_PG.new_zeros(num_tokens, table_BGD.shape[2], dtype=wide)
    for batch in _batches(tiles, table_BGD.shape):
        products_TMD = _rows(rows_PG, batch) @ table_BGD.index_select(0, batch.blocks_T)
        out_ND.index_add_(0, batch.tokens_TM.flatten(), products_TMD.flatten(0, 1).to(wide))
    return out_ND.to(rows_PG.dtype)


def table_products(rows_PG: Tensor, x_ND: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Implement :func:`.tiled_products._table_products`."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    shape = tiles.num_blocks, rows_PG.shape[1], x_ND.shape[1]
    table_BGD = x_ND.new_zeros(shape, dtype=wide)
    sums_BG = x_ND.new_zeros(shape[:2], dtype=wide)
    for batch in _batches(tiles, shape):
        rows_TMG = _rows(rows_PG, batch)
        # An infinity times zero would reach other blocks as NaN.
        x_TMD = x_ND[batch.tokens_TM].masked_fill(batch.empty_TM1, 0.0)
        products_TGD = rows_TMG.transpose(1, 2) @ x_TMD
        table_BGD.index_add_(0, batch.blocks_T, products_TGD.to(wide))
        sums_BG.index_add_(0, batch.blocks_T, rows_TMG.sum(dim=1, dtype=wide))
    return table_BGD.to(x_ND.dtype), sums_BG.to(x_ND.dtype)


def _rows(rows_PG: Tensor, batch: _Batch) -> Tensor:
    """Return the rows of the assignments, with zeros for empty rows: (T, M, G)."""
    last = max(len(rows_PG) - 1, 0)
    return rows_PG[batch.rows_TM.clamp(max=last)].masked_fill(batch.empty_TM1, 0.0)


def _batches(tiles: Tiles, table_shape: torch.Size | tuple[int, ...]) -> Iterator[_Batch]:
    num_blocks, block_size, width = table_shape
    num_assignments, device = len(tiles.order_P), tiles.order_P.device
    within_M = torch.arange(tiles.rows, device=device)
    each = (block_size + tiles.rows) * width + tiles.rows * block_size
    for tiles_2T in tiles.tiles_2T.split(max(1, ELEMENTS_AT_ONCE // each), dim=1):
        block_T, first_T = tiles_2T.long().unbind()
        real_T = block_T < num_blocks
        block_T = torch.where(real_T, block_T, 0)
        end_T = torch.where(real_T, tiles.starts_S.index_select(0, block_T + 1), 0)
        rows_TM = first_T.unsqueeze(1) + within_M
        empty_TM = rows_TM >= end_T.unsqueeze(1)
        assignments_TM = tiles.order_P[rows_TM.clamp(max=num_assignments - 1)]
        tokens_TM = assignments_TM.div(tiles.active, rounding_mode="floor")
        rows_TM = rows_TM.masked_fill(empty_TM, num_assignments)
        yield _Batch(block_T, rows_TM, tokens_TM, empty_TM.unsqueeze(2))
