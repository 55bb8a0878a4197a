import pytest
import torch

from fairseq_sffn.memory.compute.chunks import chunk_assignments


def assignments_of(blocks_NA, kept_NA=None):
    """List (block, token, index) of each assignment, in the expected order."""
    active = blocks_NA.shape[1]
    return sorted(
        (block, n, n * active + a)
        for n, row in enumerate(blocks_NA.tolist())
        for a, block in enumerate(row)
        if kept_NA is None or kept_NA[n, a]
    )


def assert_right(result, blocks_NA, num_blocks, chunk_size, kept_NA=None):
    assignments = assignments_of(blocks_NA, kept_NA)
    order_P, chunked = result
    got = [t.tolist() for t in (chunked.blocks, chunked.tokens, order_P)]
    assert got == [[assignment[i] for assignment in assignments] for i in range(3)]

    end = 0
    for chunk in chunked.chunks:
        assert chunk.assignments.start == end  # no gap, no overlap
        end = chunk.assignments.stop
        assert 0 < end - chunk.assignments.start <= chunk_size
        assert chunk.ends.dtype == torch.int32
        assert 0 <= chunk.blocks.start < chunk.blocks.stop <= num_blocks
        blocks = range(num_blocks)[chunk.blocks]
        start = chunk.assignments.start
        assert len(blocks) == len(chunk.ends)
        inside = [assignment[0] for assignment in assignments[start:end]]
        assert chunk.sizes == [inside.count(block) for block in blocks]
        assert chunk.continues == (start > 0 and assignments[start - 1][0] == assignments[start][0])
        for block, stop in zip(blocks, chunk.ends.tolist(), strict=True):
            stop += chunk.assignments.start
            assert all(assignment[0] == block for assignment in assignments[start:stop])
            start = stop
        assert start == end  # the last block ends with the chunk
        if len(chunked.chunks) > 1:  # only the blocks of its assignments
            assert (
                blocks[0] == assignments[chunk.assignments.start][0]
                and blocks[-1] == assignments[end - 1][0]
            )
    assert end == len(assignments)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 23, 24, 25, 100])
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 50])
def test_assignments_are_sorted_and_chunks_cover_them(num_blocks, chunk_size):
    active = min(num_blocks, 3)
    blocks_NA = torch.stack([torch.randperm(num_blocks)[:active] for _ in range(8)])
    chunked = chunk_assignments(blocks_NA, num_blocks, chunk_size)
    assert_right(chunked, blocks_NA, num_blocks, chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4, 7])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_dropped_assignments(share, chunk_size):
    blocks_NA = torch.randint(5, (10, 2))
    kept_NA = torch.rand(10, 2) < share
    chunked = chunk_assignments(blocks_NA, 5, chunk_size, kept_NA)
    assert_right(chunked, blocks_NA, 5, chunk_size, kept_NA)


@pytest.mark.parametrize("block", [0, 3, 6])
@pytest.mark.parametrize("chunk_size", [4, 5])
def test_one_block_takes_all(block, chunk_size):
    blocks_NA = torch.full((10, 1), block)
    assert_right(chunk_assignments(blocks_NA, 7, chunk_size), blocks_NA, 7, chunk_size)


def test_no_tokens():
    order_P, chunked = chunk_assignments(torch.empty(0, 2, dtype=torch.int64), 7, 4)
    assert chunked.chunks == [] and len(order_P) == len(chunked.tokens) == len(chunked.blocks) == 0


@pytest.mark.parametrize("num_blocks", [2**15 - 1, 2**15, 2**15 + 1, 2**17])
def test_very_many_blocks(num_blocks):
    last = num_blocks - 1
    blocks_NA = torch.tensor([[last, 0], [last - 1, last], [0, last // 2], [last, 1]])
    assert_right(chunk_assignments(blocks_NA, num_blocks, 3), blocks_NA, num_blocks, 3)


def test_duplicates_within_a_row_are_kept():
    blocks_NA = torch.tensor([[2, 2], [0, 2]])
    assert_right(chunk_assignments(blocks_NA, 3, 4), blocks_NA, 3, 4)
