import pytest
import torch

from fairseq_sffn.memory.compute import tiles
from fairseq_sffn.memory.compute.tiles import make_tiles, tile_rows


def assert_right(blocks_NA, num_blocks, kept_NA, rows, known=False):
    num_kept = int(kept_NA.sum()) if known else None
    made = make_tiles(blocks_NA, num_blocks, kept_NA, rows, num_kept)
    num_tokens, active = blocks_NA.shape
    assignments = [
        (num_blocks if kept_NA is not None and not kept_NA[n, a] else int(blocks_NA[n, a]), n, a)
        for n in range(num_tokens)
        for a in range(active)
    ]
    assignments = sorted(assignments)[:num_kept]
    assert made.order_P.tolist() == [n * active + a for _, n, a in assignments]
    starts = [
        sum(assignment[0] < block for assignment in assignments) for block in range(num_blocks + 2)
    ]
    assert made.starts_S.tolist() == starts
    want = [
        (block, first)
        for block in range(num_blocks + 1)
        for first in range(starts[block], starts[block + 1], rows)
    ]
    got = list(zip(*made.tiles_2T.tolist(), strict=True))
    assert got[: len(want)] == want
    assert all(block == num_blocks + 1 for block, _ in got[len(want) :])
    assert len(got) <= len(assignments) // rows + num_blocks + 1
    assert made.num_blocks == num_blocks and made.active == max(active, 1) and made.rows == rows
    for tensor in (made.order_P, made.starts_S, made.tiles_2T):
        assert tensor.dtype == torch.int32


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 100])
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 50])
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
def test_tiles_cover_each_assignment_once(share, num_blocks, rows):
    active = min(num_blocks, 3)
    blocks_NA = torch.stack([torch.randperm(num_blocks)[:active] for _ in range(11)])
    kept_NA = None if share is None else torch.rand(11, active) < share
    assert_right(blocks_NA, num_blocks, kept_NA, rows)
    if share is not None:
        assert_right(blocks_NA, num_blocks, kept_NA, rows, known=True)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("block", [0, 3, 6])
def test_one_block_takes_all(block, rows):
    assert_right(torch.full((17, 1), block), 7, None, rows)


def test_no_tokens():
    assert_right(torch.empty(0, 2, dtype=torch.int64), 7, None, 16)


def test_duplicates_within_a_row_are_kept():
    assert_right(torch.tensor([[2, 2], [0, 2]]), 3, None, 2)


@pytest.mark.parametrize("num_blocks", [2**15 - 3, 2**15 - 2, 2**15 - 1, 2**15, 2**17])
def test_very_many_blocks(num_blocks):
    last = num_blocks - 1
    blocks_NA = torch.tensor([[last, 0], [last - 1, last], [0, last // 2], [last, 1]])
    kept_NA = torch.ones(4, 2, dtype=torch.bool)
    kept_NA[0, 0] = False
    made = make_tiles(blocks_NA, num_blocks, kept_NA, 16)
    assert made.order_P.tolist() == [1, 4, 7, 5, 2, 3, 6, 0]
    assert made.starts_S[[0, 1, 2, last, last + 1, last + 2]].tolist() == [0, 2, 3, 5, 7, 8]


def test_an_even_load_fills_a_tile():
    for num_assignments, num_blocks, rows in [
        (8192, 16, 128),
        (640, 10, 64),
        (64, 1024, 16),
        (0, 4, 16),
    ]:
        assert tile_rows(num_assignments, num_blocks) == rows
        assert rows in tiles.TILE_ROWS
