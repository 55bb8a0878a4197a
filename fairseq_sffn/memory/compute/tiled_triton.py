"""The operators of :mod:`.tiled_products` in the kernels of :mod:`.triton_kernels`, for CUDA."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .tiles import Tiles
from .triton_kernels import gathered_kernel, scattered_kernel, table_kernel

MOST_OUTPUTS, DEPTH_BYTES, MOST_STAGES = 128, 128, 4
"""Maximum number of rows and of columns that a program computes, of bytes of a row in one step, and
of pipelined steps."""

SCATTERED_ELEMENTS = 2**28
"""Maximum number of elements of the assignments' results that are held for deterministic sums."""


class Sizes(NamedTuple):
    """The sizes that a kernel is compiled for.

    Attributes:
        rows: rows of a tile.
        block_size, width: G and D of the tables.
        dtype: of all tensors but sums.
    """

    rows: int
    block_size: int
    width: int
    dtype: torch.dtype


def gathered_constants(sizes: Sizes, shared_bytes: int) -> dict[str, Any]:
    """Return the compile-time constants and options of ``gathered_kernel``.

    Args:
        sizes: tile and table.
        shared_bytes: shared memory available to a program.
    """
    return _constants(sizes, sizes.rows, sizes.block_size, sizes.width, shared_bytes)


def scattered_constants(sizes: Sizes, shared_bytes: int) -> dict[str, Any]:
    """Return the compile-time constants and options of ``scattered_kernel``."""
    return _constants(sizes, sizes.rows, sizes.width, sizes.block_size, shared_bytes)


def table_constants(sizes: Sizes, shared_bytes: int) -> dict[str, Any]:
    """Return the compile-time constants and options of ``table_kernel``."""
    cells = _at_most(MOST_OUTPUTS, sizes.block_size)
    return _constants(sizes, cells, sizes.width, sizes.rows, shared_bytes)


def _constants(
    sizes: Sizes, rows: int, columns: int, depth: int, shared_bytes: int
) -> dict[str, Any]:
    """Divide a product of ``rows`` x ``depth`` and ``depth`` x ``columns`` matrices."""
    itemsize = sizes.dtype.itemsize
    columns = _at_most(MOST_OUTPUTS, columns)
    depth = _at_most(DEPTH_BYTES // itemsize, depth)
    stage_bytes = (rows + columns) * depth * itemsize  # a step of both matrices
    tf32 = sizes.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "D": sizes.width,
        "G": sizes.block_size,
        "PRECISION": "tf32" if tf32 else "ieee",
        "ROWS": rows,
        "COLUMNS": columns,
        "DEPTH": depth,
        "num_warps": 8 if rows * columns >= MOST_OUTPUTS**2 else 4,
        "num_stages": max(1, min(MOST_STAGES, shared_bytes // stage_bytes)),
    }


def _at_most(most: int, size: int) -> int:
    """Return the power of two that covers ``size``, between 16 and ``most``."""
    return max(16, min(most, triton.next_power_of_2(size)))


def gathered_products(
    x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, tiles: Tiles
) -> Tensor:
    """Implement :func:`.tiled_products.gathered_products`."""
    num_blocks, block_size, _ = table_BGD.shape
    out_PG = x_ND.new_empty(len(tiles.order_P), block_size)
    constants = gathered_constants(_sizes(table_BGD, tiles), _shared_bytes(x_ND.device))
    num_tiles = tiles.tiles_2T.shape[1]
    gathered_kernel[(num_tiles * triton.cdiv(block_size, constants["COLUMNS"]),)](
        x_ND,
        table_BGD,
        bias_BG,
        tiles.order_P,
        tiles.starts_S,
        tiles.tiles_2T,
        out_PG,
        num_tiles,
        num_blocks,
        tiles.active,
        HAS_BIAS=bias_BG is not None,
        **constants,
    )
    return out_PG


def scattered_products(rows_PG: Tensor, table_BGD: Tensor, num_tokens: int, tiles: Tiles) -> Tensor:
    """Implement :func:`.tiled_products.scattered_products`.

    Atomic additions sum in no fixed order. With ``torch.use_deterministic_algorithms`` the results
    of the assignments are stored and then summed by token.
    """
    width = table_BGD.shape[2]
    if not torch.are_deterministic_algorithms_enabled():
        out_ND = rows_PG.new_zeros(num_tokens, width, dtype=torch.float32)
        _scatter(rows_PG, table_BGD, tiles, out_ND, 0, by_assignment=False)
        return out_ND.to(rows_PG.dtype)
    num_assignments = num_tokens * tiles.active
    columns = max(16, SCATTERED_ELEMENTS // max(num_assignments, 1) // 16 * 16)
    out_ND = rows_PG.new_empty(num_tokens, width)
    for part_nD in out_ND.split(columns, dim=1):
        # Zeros: the kernel does not write dropped assignments.
        by_assignment = rows_PG.new_zeros(num_assignments, part_nD.shape[1], dtype=torch.float32)
        _scatter(
            rows_PG, table_BGD, tiles, by_assignment, part_nD.storage_offset(), by_assignment=True
        )
        part_nD.copy_(by_assignment.unflatten(0, (num_tokens, tiles.active)).sum(dim=1))
    return out_ND


def _scatter(
    rows_PG: Tensor,
    table_BGD: Tensor,
    tiles: Tiles,
    out: Tensor,
    first_column: int,
    by_assignment: bool,
) -> None:
    constants = scattered_constants(_sizes(table_BGD, tiles), _shared_bytes(out.device))
    num_tiles, out_width = tiles.tiles_2T.shape[1], out.shape[1]
    scattered_kernel[(num_tiles * triton.cdiv(out_width, constants["COLUMNS"]),)](
        rows_PG,
        table_BGD,
        tiles.order_P,
        tiles.starts_S,
        tiles.tiles_2T,
        out,
        num_tiles,
        len(table_BGD),
        tiles.active,
        first_column,
        out_width,
        BY_ASSIGNMENT=by_assignment,
        **constants,
    )


def table_products(rows_PG: Tensor, x_ND: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Implement :func:`.tiled_products._table_products`."""
    num_blocks, block_size, width = tiles.num_blocks, rows_PG.shape[1], x_ND.shape[1]
    table_BGD = x_ND.new_empty(num_blocks, block_size, width)
    sums_BG = x_ND.new_empty(num_blocks, block_size)
    constants = table_constants(_sizes(table_BGD, tiles), _shared_bytes(x_ND.device))
    parts = triton.cdiv(block_size, constants["ROWS"]) * triton.cdiv(width, constants["COLUMNS"])
    table_kernel[(num_blocks * parts,)](
        rows_PG,
        x_ND,
        tiles.order_P,
        tiles.starts_S,
        table_BGD,
        sums_BG,
        tiles.active,
        **constants,
    )
    return table_BGD, sums_BG


def _sizes(table_BGD: Tensor, tiles: Tiles) -> Sizes:
    _, block_size, width = table_BGD.shape
    return Sizes(tiles.rows, block_size, width, table_BGD.dtype)


def _shared_bytes(device: torch.device) -> int:
    """Return the shared memory available to a program on this device."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
