import pytest
import torch

from fairseq_sffn.memory.compute.plan import make_plan


def pairs_of(blocks_NA, kept_NA=None):
    """(block, token, index) of each pair, sorted as the plan must sort them."""
    active = blocks_NA.shape[1]
    return sorted(
        (block, n, n * active + a)
        for n, row in enumerate(blocks_NA.tolist())
        for a, block in enumerate(row)
        if kept_NA is None or kept_NA[n, a]
    )


def assert_right(result, blocks_NA, num_blocks, chunk_pairs, kept_NA=None):
    pairs = pairs_of(blocks_NA, kept_NA)
    order_P, plan = result
    got = [t.tolist() for t in (plan.blocks, plan.tokens, order_P)]
    assert got == [[pair[i] for pair in pairs] for i in range(3)]

    end = 0
    for chunk in plan.chunks:
        assert chunk.pairs.start == end  # no gap, no overlap
        end = chunk.pairs.stop
        assert 0 < end - chunk.pairs.start <= chunk_pairs
        assert chunk.ends.dtype == torch.int32
        assert 0 <= chunk.blocks.start < chunk.blocks.stop <= num_blocks
        blocks = range(num_blocks)[chunk.blocks]
        start = chunk.pairs.start
        assert len(blocks) == len(chunk.ends)
        inside = [pair[0] for pair in pairs[start:end]]
        assert chunk.sizes == [inside.count(block) for block in blocks]
        assert chunk.continues == (start > 0 and pairs[start - 1][0] == pairs[start][0])
        for block, stop in zip(blocks, chunk.ends.tolist(), strict=True):
            stop += chunk.pairs.start
            assert all(pair[0] == block for pair in pairs[start:stop])
            start = stop
        assert start == end  # the last block ends with the chunk
        if len(plan.chunks) > 1:  # no blocks but those of its pairs
            assert blocks[0] == pairs[chunk.pairs.start][0] and blocks[-1] == pairs[end - 1][0]
    assert end == len(pairs)


@pytest.mark.parametrize("chunk_pairs", [1, 2, 3, 5, 23, 24, 25, 100])
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 50])
def test_pairs_are_sorted_and_chunks_cover_them(num_blocks, chunk_pairs):
    active = min(num_blocks, 3)
    blocks_NA = torch.stack([torch.randperm(num_blocks)[:active] for _ in range(8)])
    plan = make_plan(blocks_NA, num_blocks, chunk_pairs)
    assert_right(plan, blocks_NA, num_blocks, chunk_pairs)


@pytest.mark.parametrize("chunk_pairs", [1, 4, 7])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_left_out_pairs(share, chunk_pairs):
    blocks_NA = torch.randint(5, (10, 2))
    kept_NA = torch.rand(10, 2) < share
    plan = make_plan(blocks_NA, 5, chunk_pairs, kept_NA)
    assert_right(plan, blocks_NA, 5, chunk_pairs, kept_NA)


@pytest.mark.parametrize("block", [0, 3, 6])
@pytest.mark.parametrize("chunk_pairs", [4, 5])
def test_one_block_takes_all(block, chunk_pairs):
    blocks_NA = torch.full((10, 1), block)
    assert_right(make_plan(blocks_NA, 7, chunk_pairs), blocks_NA, 7, chunk_pairs)


def test_no_tokens():
    order_P, plan = make_plan(torch.empty(0, 2, dtype=torch.int64), 7, 4)
    assert plan.chunks == [] and len(order_P) == len(plan.tokens) == len(plan.blocks) == 0


@pytest.mark.parametrize("num_blocks", [2**15 - 1, 2**15, 2**15 + 1, 2**17])
def test_very_many_blocks(num_blocks):
    last = num_blocks - 1
    blocks_NA = torch.tensor([[last, 0], [last - 1, last], [0, last // 2], [last, 1]])
    assert_right(make_plan(blocks_NA, num_blocks, 3), blocks_NA, num_blocks, 3)


def test_duplicates_within_a_row_are_kept():
    blocks_NA = torch.tensor([[2, 2], [0, 2]])
    assert_right(make_plan(blocks_NA, 3, 4), blocks_NA, 3, 4)
