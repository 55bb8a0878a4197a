"""Assignments sorted by block and cut into tiles, without a read from the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import sort_blocks

TILE_ROWS = (16, 32, 64, 128)
"""Possible numbers of rows of a tile: powers of two, which matrix units require."""


class Tiles(NamedTuple):
    """Assignments sorted by block, and their tiles.

    A tile has consecutive assignments of one block.
    Only the device knows the number of tiles. The tensors have room for the maximum; unused tiles
    have the block number B + 1 and compute nothing.

    Attributes:
        order_P: (P,) int32, the index n * A + a of each sorted assignment.
        starts_S: (B + 2,) int32, the start of each block's assignments, then the start of the
            dropped assignments, then P.
        tiles_2T: (2, T) int32, the block of each tile (B for dropped assignments, B + 1 for unused
            tiles) and its first assignment.
        active: A, assignments per token.
        rows: maximum number of assignments in a tile.
    """

    order_P: Tensor
    starts_S: Tensor
    tiles_2T: Tensor
    active: int
    rows: int

    @property
    def num_blocks(self) -> int:
        """Number of blocks B."""
        return len(self.starts_S) - 2


def make_tiles(
    blocks_NA: Tensor,
    num_blocks: int,
    kept_NA: Tensor | None,
    rows: int,
    num_kept: int | None = None,
) -> Tiles:
    """Sort the assignments by block and cut them into tiles.

    Args:
        blocks_NA: selected blocks.
        num_blocks: B.
        kept_NA: bool, ``False`` for assignments to drop; ``None``: all are kept.
        rows: maximum number of assignments in a tile.
        num_kept: number of kept assignments, if the host knows it. P is then this number; otherwise
            P = N * A, with the dropped assignments last.
    """
    if kept_NA is not None:
        blocks_NA = blocks_NA.masked_fill(~kept_NA, num_blocks)
    sorted_P, order_P = sort_blocks(blocks_NA.flatten(), num_blocks + 2)
    order_P = order_P[:num_kept]
    num_assignments, device = len(order_P), order_P.device
    blocks_S = torch.arange(num_blocks + 2, device=device, dtype=sorted_P.dtype)
    starts_S = torch.searchsorted(sorted_P, blocks_S, out_int32=True).clamp_(max=num_assignments)
    # Each block has at most one tile that is not full.
    room = num_assignments // rows + min(num_blocks + 1, num_assignments)
    tiles_B = (starts_S.diff() + (rows - 1)).div(rows, rounding_mode="floor")
    ends_B = tiles_B.cumsum(0, dtype=torch.int32)
    tile_T = torch.arange(room, device=device, dtype=torch.int32)
    block_T = torch.searchsorted(ends_B, tile_T, right=True, out_int32=True)
    known_T = block_T.clamp(max=num_blocks)
    within_T = tile_T - (ends_B - tiles_B).index_select(0, known_T)
    first_T = starts_S.index_select(0, known_T) + within_T * rows
    tiles_2T = torch.stack([block_T, first_T])
    return Tiles(order_P.int(), starts_S, tiles_2T, max(blocks_NA.shape[1], 1), rows)


def tile_rows(num_assignments: int, num_blocks: int) -> int:
    """Return the number of rows of a tile that an even load approximately fills."""
    each = num_assignments / num_blocks
    return next((rows for rows in TILE_ROWS if rows >= each), TILE_ROWS[-1])
