import math

import pytest
import torch

from fairseq_sffn.memory.capacity import keep_within_capacity
from tests.memory.cases import build, close, tokens


def keep(blocks, num_blocks, factor, valid=None):
    valid_N = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    kept_NA = keep_within_capacity(
        torch.tensor(blocks), num_blocks, factor, None if valid is None else valid_N.unsqueeze(1)
    )
    assert kept_NA.dtype == torch.bool
    return kept_NA.int().tolist()


def test_factor_one_drops_exactly_what_is_over_the_fair_share():
    assert keep([[2]] * 8, 4, 1.0) == [[1]] * 2 + [[0]] * 6


def test_earlier_tokens_win():
    assert keep([[0], [1], [0], [1], [1], [0]], 2, 0.7) == [[1], [1], [1], [1], [0], [0]]


def test_first_choices_go_before_second_ones():
    # Room for 2 in each block: block 0 is the second choice of tokens 0 and 1, the first of 2.
    assert keep([[1, 0], [1, 0], [0, 2]], 3, 1.0) == [[1, 1], [1, 0], [1, 1]]


def test_a_large_factor_drops_nothing():
    blocks = torch.randint(4, (50, 1))
    assert keep_within_capacity(blocks, 4, 4.0, None).all()


def test_every_block_takes_at_least_one():
    assert keep([[0], [0]], 8, 0.1) == [[1], [0]]


def test_padding_takes_no_room_and_does_not_raise_the_capacity():
    kept = keep([[0]] * 8, 2, 1.0, valid=[0, 1, 0, 1, 1, 0, 0, 1])  # 4 tokens: room for 2
    assert [kept[n] for n in (1, 3, 4, 7)] == [[1], [1], [0], [0]]


@pytest.mark.parametrize("valid", [None, []])
def test_no_tokens(valid):
    valid_N = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    empty = torch.empty(0, 2, dtype=torch.int64)
    assert keep_within_capacity(
        empty, 4, 1.0, None if valid is None else valid_N.unsqueeze(1)
    ).shape == (0, 2)


@pytest.mark.parametrize("factor", [0.25, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("active", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_a_queue(active, factor, padded):
    blocks_NA = torch.stack([torch.randperm(5)[:active] for _ in range(30)])
    valid_N = torch.rand(30) < 0.7 if padded else torch.ones(30, dtype=torch.bool)
    capacity = max(1, int(factor * math.ceil(int(valid_N.sum()) * active / 5)))
    room = [capacity] * 5
    expected = torch.zeros(30, active, dtype=torch.bool)
    for a in range(active):
        for n in valid_N.nonzero().flatten().tolist():
            block = int(blocks_NA[n, a])
            expected[n, a] = room[block] > 0
            room[block] -= 1
    kept_NA = keep_within_capacity(blocks_NA, 5, factor, valid_N.unsqueeze(1) if padded else None)
    assert torch.equal(kept_NA[valid_N], expected[valid_N])


@pytest.mark.parametrize("num_earlier", [1, 10, 29])
def test_later_tokens_never_displace_earlier_ones(num_earlier):
    blocks_NA = torch.stack([torch.randperm(5)[:2] for _ in range(30)])
    changed_NA = blocks_NA.clone()
    changed_NA[num_earlier:] = torch.stack([torch.randperm(5)[:2] for _ in range(30)])[num_earlier:]
    before, after = (keep_within_capacity(b, 5, 1.0, None) for b in (blocks_NA, changed_NA))
    assert torch.equal(before[:num_earlier, 0], after[:num_earlier, 0])


def test_a_huge_factor_drops_nothing():
    assert keep([[0]] * 8, 4, 1e19) == [[1]] * 8


def test_dropped_tokens_get_only_the_output_bias():
    memory, (x, _) = build("switch-top1", capacity_factor=1.0), tokens(1)
    out = memory(x.repeat(8, 1))  # 8 tokens to one of 4 blocks with room for 2
    assert out.usage.dropped == 6
    assert out.usage.counts.max() == 8
    assert (out.output[:2] != memory.value_bias).any()
    assert torch.equal(out.output[2:], memory.value_bias.expand(6, -1))
    without = build("switch-top1", capacity_factor=1.0, bias=False)(x.repeat(8, 1))
    assert (without.output[2:] == 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_each_mode_has_its_own_capacity(training):
    factors = dict(capacity_factor=1.0, eval_capacity_factor=2.0)
    memory = build("switch-top1", **factors).train(training)
    out = memory(tokens(1)[0].repeat(8, 1))
    assert out.usage.dropped == (6 if training else 4)


def test_evaluation_is_dropless_by_default():
    memory = build("switch-top1", capacity_factor=1.0).eval()
    out = memory(tokens(1)[0].repeat(8, 1))
    assert out.usage.dropped == 0
    close(out.output, out.output[:1].expand(8, -1), tolerance=1e-12)
