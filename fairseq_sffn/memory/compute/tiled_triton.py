"""The operators of :mod:`.tiled_products` by :mod:`.triton_kernels`, on CUDA devices."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .tiles import Tiles
from .triton_kernels import gathered_kernel, scattered_kernel, table_kernel

SCATTERED_ELEMENTS = 2**28
"""The most numbers of pairs that are held at once where sums are to be reproducible."""


class Config(NamedTuple):
    """How a kernel cuts its products.

    Attributes:
        columns: of the result that a program computes.
        depth: numbers that are multiplied and added up at a time.
        warps, stages: of a program.
    """

    columns: int
    depth: int
    warps: int
    stages: int


def config(rows: int, columns: int, depth: int, itemsize: int, shared_bytes: int) -> Config:
    """How to cut products of ``rows`` x ``depth`` and ``depth`` x ``columns`` matrices.

    Args:
        itemsize: bytes of a number.
        shared_bytes: shared memory that a program may have.
    """
    wide = _at_most(128, columns)
    deep = _at_most(128 // itemsize, depth)
    warps = 8 if rows * wide >= 128 * 128 else 4
    # As many stages as fit: each has a part of both matrices.
    each = (rows + wide) * deep * itemsize
    return Config(wide, deep, warps, max(1, min(4, shared_bytes // each)))


def _at_most(most: int, size: int) -> int:
    """The power of two that covers ``size``, within what matrix units take."""
    return max(16, min(most, triton.next_power_of_2(size)))


def gathered_products(
    x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, tiles: Tiles
) -> Tensor:
    """See :func:`.tiled_products.gathered_products`."""
    num_blocks, block_size, width = table_BGD.shape
    out_PG = x_ND.new_empty(len(tiles.order_P), block_size)
    num_tiles = tiles.tiles_2T.shape[1]
    cut = config(tiles.rows, block_size, width, x_ND.element_size(), _shared_bytes(x_ND.device))
    gathered_kernel[(num_tiles * triton.cdiv(block_size, cut.columns),)](
        x_ND,
        table_BGD,
        bias_BG,
        tiles.order_P,
        tiles.starts_S,
        tiles.tiles_2T,
        out_PG,
        num_tiles,
        num_blocks,
        ACTIVE=tiles.active,
        D=width,
        G=block_size,
        HAS_BIAS=bias_BG is not None,
        **_launch(cut, tiles.rows, x_ND.dtype),
    )
    return out_PG


def scattered_products(rows_PG: Tensor, table_BGD: Tensor, num_tokens: int, tiles: Tiles) -> Tensor:
    """See :func:`.tiled_products.scattered_products`.

    Sums are by atomic additions, in no order; or, with ``torch.use_deterministic_algorithms``, by
    token from what each pair gives.
    """
    width = table_BGD.shape[2]
    if not torch.are_deterministic_algorithms_enabled():
        out_ND = rows_PG.new_zeros(num_tokens, width, dtype=torch.float32)
        _scatter(rows_PG, table_BGD, tiles, out_ND, 0, width, by_pair=False)
        return out_ND.to(rows_PG.dtype)
    num_pairs = num_tokens * tiles.active
    columns = max(16, SCATTERED_ELEMENTS // max(num_pairs, 1) // 16 * 16)
    out_ND = rows_PG.new_empty(num_tokens, width)
    for first in range(0, width, columns):
        part = slice(first, min(first + columns, width))
        # Pairs of no block are not written.
        by_pair = rows_PG.new_zeros(num_pairs, part.stop - part.start, dtype=torch.float32)
        _scatter(rows_PG, table_BGD, tiles, by_pair, first, by_pair.shape[1], by_pair=True)
        out_ND[:, part] = by_pair.unflatten(0, (-1, tiles.active)).sum(dim=1)
    return out_ND


def _scatter(
    rows_PG: Tensor,
    table_BGD: Tensor,
    tiles: Tiles,
    out: Tensor,
    first_column: int,
    out_width: int,
    by_pair: bool,
) -> None:
    num_blocks, block_size, width = table_BGD.shape
    num_tiles = tiles.tiles_2T.shape[1]
    shared_bytes = _shared_bytes(rows_PG.device)
    cut = config(tiles.rows, out_width, block_size, rows_PG.element_size(), shared_bytes)
    scattered_kernel[(num_tiles * triton.cdiv(out_width, cut.columns),)](
        rows_PG,
        table_BGD,
        tiles.order_P,
        tiles.starts_S,
        tiles.tiles_2T,
        out,
        num_tiles,
        num_blocks,
        first_column,
        out_width,
        ACTIVE=tiles.active,
        D=width,
        G=block_size,
        BY_PAIR=by_pair,
        **_launch(cut, tiles.rows, rows_PG.dtype),
    )


def table_products(rows_PG: Tensor, x_ND: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """See :func:`.tiled_products._table_products`."""
    num_blocks, block_size, width = tiles.num_blocks, rows_PG.shape[1], x_ND.shape[1]
    table_BGD = x_ND.new_empty(num_blocks, block_size, width)
    sums_BG = x_ND.new_empty(num_blocks, block_size)
    cells = _at_most(128, block_size)
    shared_bytes = _shared_bytes(x_ND.device)
    cut = config(cells, width, tiles.rows, x_ND.element_size(), shared_bytes)
    table_kernel[(num_blocks * triton.cdiv(block_size, cells) * triton.cdiv(width, cut.columns),)](
        rows_PG,
        x_ND,
        tiles.order_P,
        tiles.starts_S,
        table_BGD,
        sums_BG,
        ACTIVE=tiles.active,
        D=width,
        G=block_size,
        **_launch(cut, cells, x_ND.dtype),
    )
    return table_BGD, sums_BG


def _launch(cut: Config, rows: int, dtype: torch.dtype) -> dict[str, int | str]:
    """What all kernels are launched with."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        "ROWS": rows,
        "COLUMNS": cut.columns,
        "DEPTH": cut.depth,
        "num_warps": cut.warps,
        "num_stages": cut.stages,
    }


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program on this device may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
