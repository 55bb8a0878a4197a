"""Pairs sorted by block and cut into tiles, without asking the device for anything."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .plan import sort_blocks

TILE_ROWS = (16, 32, 64, 128)
"""The rows that a tile may have: powers of two, as matrix units want them."""


class Tiles(NamedTuple):
    """(token, block) pairs in the order of their blocks, and the tiles they are multiplied in, each
    of consecutive pairs of one block.

    How many tiles there are is known to the device alone. The tensors have room for the most there
    can be; the rest names a block beyond all, and does nothing.

    Attributes:
        order_P: (P,) int32, which pair, n * A + a, each sorted one is.
        starts_S: (B + 2,) int32, where the pairs of each block start, then where those start that
            belong to none (they were dropped), then P.
        tiles_2T: int32, the block of each tile, B for pairs of none and B + 1 for no tile; and its
            first pair.
        active: A, pairs of a token.
        rows: the most pairs in a tile.
    """

    order_P: Tensor
    starts_S: Tensor
    tiles_2T: Tensor
    active: int
    rows: int

    @property
    def num_blocks(self) -> int:
        """B."""
        return len(self.starts_S) - 2


def make_tiles(
    blocks_NA: Tensor,
    num_blocks: int,
    kept_NA: Tensor | None,
    rows: int,
    num_kept: int | None = None,
) -> Tiles:
    """Sort pairs by block and cut them into tiles.

    Args:
        blocks_NA: selected blocks.
        num_blocks: B.
        kept_NA: pairs to leave out are ``False``.
        rows: the most pairs in a tile.
        num_kept: pairs that are not left out, if known: the others are then not among the sorted
            ones, rather than last.
    """
    if kept_NA is not None:
        blocks_NA = blocks_NA.masked_fill(~kept_NA, num_blocks)
    sorted_P, order_P = sort_blocks(blocks_NA.flatten(), num_blocks + 2)
    order_P = order_P[:num_kept]
    num_pairs, device = len(order_P), order_P.device
    blocks_S = torch.arange(num_blocks + 2, device=device, dtype=sorted_P.dtype)
    starts_S = torch.searchsorted(sorted_P, blocks_S, out_int32=True).clamp_(max=num_pairs)
    # Each block has a tile that is not full, at most.
    room = num_pairs // rows + min(num_blocks + 1, num_pairs)
    tiles_B = (starts_S.diff() + (rows - 1)).div(rows, rounding_mode="floor")
    ends_B = tiles_B.cumsum(0, dtype=torch.int32)
    tile_T = torch.arange(room, device=device, dtype=torch.int32)
    block_T = torch.searchsorted(ends_B, tile_T, right=True, out_int32=True)
    known_T = block_T.clamp(max=num_blocks)
    within_T = tile_T - (ends_B - tiles_B).index_select(0, known_T)
    first_T = starts_S.index_select(0, known_T) + within_T * rows
    tiles_2T = torch.stack([block_T, first_T])
    return Tiles(order_P.int(), starts_S, tiles_2T, max(blocks_NA.shape[1], 1), rows)


def tile_rows(num_pairs: int, num_blocks: int) -> int:
    """Rows of a tile that an even load about fills."""
    each = num_pairs / num_blocks
    return next((rows for rows in TILE_ROWS if rows >= each), TILE_ROWS[-1])
