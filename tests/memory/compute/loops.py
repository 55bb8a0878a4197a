"""Computes products of rows with the tables of their blocks in plain loops over assignments."""

from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_sffn.memory.compute.tiles import Tiles, make_tiles

CASES = {
    "even": dict(tokens=24, blocks=8, active=2),
    "uneven": dict(tokens=37, blocks=7, active=3),
    "one block has half of all": dict(tokens=40, blocks=6, active=2, skewed=True),
    "many blocks are empty": dict(tokens=5, blocks=60, active=2),
    "one block": dict(tokens=19, blocks=1, active=1),
    "no token": dict(tokens=0, blocks=4, active=2),
    "one token": dict(tokens=1, blocks=4, active=4),
    "three tokens": dict(tokens=3, blocks=9, active=2),
}
"""Name -> numbers of tokens, of blocks, and of active blocks per token."""


class Assigned(NamedTuple):
    """The blocks of each token, and the tiles of these assignments."""

    blocks_NA: Tensor
    kept_NA: Tensor | None
    tiles: Tiles


def make_assignments(
    tokens: int, blocks: int, active: int, skewed: bool = False, drops: bool = False, rows: int = 16
) -> Assigned:
    """Draw distinct random blocks.

    With ``skewed`` all tokens use the last block; with ``drops`` a third of the assignments is
    dropped.
    """
    rows_A = [torch.randperm(blocks - skewed)[: active - skewed] for _ in range(tokens)]
    blocks_NA = torch.stack(rows_A) if rows_A else torch.empty(0, active, dtype=torch.int64)
    if skewed:
        blocks_NA = torch.cat([blocks_NA, torch.full((tokens, 1), blocks - 1)], dim=1)
    kept_NA = torch.rand(tokens, active) < 0.67 if drops else None
    return Assigned(blocks_NA, kept_NA, make_tiles(blocks_NA, blocks, kept_NA, rows))


def gathered(x_ND: Tensor, table_BGD: Tensor, bias_BG: Tensor | None, assigned: Assigned) -> Tensor:
    """Compute ``gathered_products`` by its definition."""
    block_size = table_BGD.shape[1]
    rows = []
    for assignment in assigned.tiles.order_P.tolist():
        n, a = divmod(assignment, assigned.blocks_NA.shape[1])
        if assigned.kept_NA is not None and not assigned.kept_NA[n, a]:
            rows.append(x_ND.new_zeros(block_size))
            continue
        block = assigned.blocks_NA[n, a]
        row = (x_ND[n] * table_BGD[block]).sum(dim=1)
        rows.append(row if bias_BG is None else row + bias_BG[block])
    return torch.stack(rows) if rows else x_ND.new_zeros(0, block_size) + 0 * x_ND.sum()


def scattered(rows_PG: Tensor, table_BGD: Tensor, num_tokens: int, assigned: Assigned) -> Tensor:
    """Compute ``scattered_products`` by its definition."""
    sums = [rows_PG.new_zeros(table_BGD.shape[2]) for _ in range(num_tokens)]
    for row_G, assignment in zip(rows_PG, assigned.tiles.order_P.tolist(), strict=True):
        n, a = divmod(assignment, assigned.blocks_NA.shape[1])
        if assigned.kept_NA is None or assigned.kept_NA[n, a]:
            sums[n] = sums[n] + (row_G.unsqueeze(1) * table_BGD[assigned.blocks_NA[n, a]]).sum(
                dim=0
            )
    if not sums:
        return rows_PG.new_zeros(0, table_BGD.shape[2])
    return torch.stack(sums)


def table(
    rows_PG: Tensor, x_ND: Tensor, num_blocks: int, assigned: Assigned
) -> tuple[Tensor, Tensor]:
    """Compute ``table_products`` by its definition."""
    table_BGD = rows_PG.new_zeros(num_blocks, rows_PG.shape[1], x_ND.shape[1])
    sums_BG = rows_PG.new_zeros(num_blocks, rows_PG.shape[1])
    for row_G, assignment in zip(rows_PG, assigned.tiles.order_P.tolist(), strict=True):
        n, a = divmod(assignment, assigned.blocks_NA.shape[1])
        if assigned.kept_NA is None or assigned.kept_NA[n, a]:
            block = assigned.blocks_NA[n, a]
            table_BGD[block] += row_G.unsqueeze(1) * x_ND[n]
            sums_BG[block] += row_G
    return table_BGD, sums_BG
