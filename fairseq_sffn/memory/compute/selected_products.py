"""Products of a row of each assignment with the table of its block, in the order of assignments."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import chunk_assignments
from .engines import CACHED_ASSIGNMENTS, ENGINES, SortedAssignments
from .sorted_assignments import pre_activations
from .tiled_products import gathered_products
from .tiles import make_tiles, tile_rows


def selected_products(
    rows_PX: Tensor,
    table_BGX: Tensor,
    bias_BG: Tensor | None,
    blocks_NA: Tensor,
    engine: str | None = None,
) -> Tensor:
    """Compute row . table + bias of the block of each assignment: (N, A, G).

    On a CPU the assignments are multiplied block by block, elsewhere tile by tile.

    Args:
        rows_PX: a row for each of the N * A assignments, in the dtype of the table.
        table_BGX, bias_BG: a table for each block, and the bias of its rows.
        blocks_NA: the block of each assignment.
        engine: name of a preferred engine; on a CPU, the first one of this one, ``native_loop`` and
            ``loop`` that multiplies block by block and supports the table.
    """
    blocks_P1 = blocks_NA.reshape(-1, 1)
    num_blocks, block_size, width = table_BGX.shape
    shape, device = (num_blocks, block_size, width), rows_PX.device.type
    with torch.autocast(device, enabled=False):
        if device == "cpu" and not torch.compiler.is_compiling():
            names = ["native_loop", "loop"] if engine is None else [engine, "native_loop", "loop"]
            block_by_block = next(
                found
                for found in map(ENGINES.__getitem__, names)
                if isinstance(found, SortedAssignments)
                and found.supports(device, table_BGX.dtype, shape)
            )
            order_P, chunks = chunk_assignments(blocks_P1, num_blocks, CACHED_ASSIGNMENTS)
            (sorted_PG,) = pre_activations(
                rows_PX, [(table_BGX, bias_BG)], chunks, block_by_block.mm
            )
        else:
            tiles = make_tiles(blocks_P1, num_blocks, None, tile_rows(len(rows_PX), num_blocks))
            order_P = tiles.order_P.long()
            sorted_PG = gathered_products(rows_PX, table_BGX, bias_BG, tiles)
        places_P = torch.arange(len(order_P), device=order_P.device)
        inverse_P = torch.empty_like(order_P).scatter_(0, order_P, places_P)
    return sorted_PG.index_select(0, inverse_P).unflatten(0, blocks_NA.shape)
