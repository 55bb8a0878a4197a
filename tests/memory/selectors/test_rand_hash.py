import math

import pytest
import torch

from fairseq_sffn.memory import ConfigError
from fairseq_sffn.memory.selectors.rand_hash import RandHash, random_blocks
from tests.memory.cases import CPU_ENGINES, VOCAB_SIZE, build, close, tokens


@pytest.mark.parametrize(
    ("vocab_size", "num_blocks", "active"),
    [(1, 1, 1), (1, 8, 3), (50, 8, 8), (50, 8, 1), (200, 64, 16)],
)
def test_every_id_owns_distinct_blocks(vocab_size, num_blocks, active):
    table_VA = random_blocks(vocab_size, num_blocks, active)
    assert table_VA.shape == (vocab_size, active)
    assert table_VA.min() >= 0 and table_VA.max() < num_blocks
    assert all(len(set(row)) == active for row in table_VA.tolist())


@pytest.mark.parametrize("active", [1, 4])
def test_blocks_are_drawn_uniformly_in_every_place(active):
    table_VA = random_blocks(20_000, 16, active)
    for column_V in table_VA.t():
        counts = torch.bincount(column_V.long(), minlength=16)
        assert (counts - 1250).abs().max() < 5 * math.sqrt(1250)


def test_pairs_of_blocks_are_drawn_uniformly():
    table_VA = random_blocks(20_000, 6, 2).long()
    counts = torch.bincount(table_VA[:, 0] * 6 + table_VA[:, 1], minlength=36).view(6, 6)
    assert (counts.diagonal() == 0).all()
    others = counts[~torch.eye(6, dtype=torch.bool)]
    assert (others - 20_000 / 30).abs().max() < 5 * math.sqrt(20_000 / 30)


def test_ids_differ():
    rows = {tuple(sorted(row)) for row in random_blocks(1000, 256, 64).tolist()}
    assert len(rows) == 1000


def test_rows_drawn_in_parts_are_all_filled():
    # 2**22 / 2**20 = 4 rows at a time.
    table_VA = random_blocks(9, 2**20, 3)
    assert len({tuple(row) for row in table_VA.tolist()}) == 9
    assert table_VA.min() >= 0 and table_VA.max() < 2**20


@pytest.mark.parametrize(
    ("num_blocks", "dtype"), [(32_768, torch.int16), (32_769, torch.int32), (70_000, torch.int32)]
)
def test_block_numbers_fit_their_dtype(num_blocks, dtype):
    table_VA = random_blocks(2, num_blocks, num_blocks)  # all of them
    assert table_VA.dtype == dtype
    assert torch.equal(table_VA.long().sort(dim=1).values[0], torch.arange(num_blocks))


@pytest.mark.parametrize("num_blocks", [32_768, 32_769])
@pytest.mark.parametrize("engine", [*CPU_ENGINES, None])
def test_the_last_block_is_computed(num_blocks, engine):
    memory = build("rand_hash", num_cells=num_blocks, block_size=1, engine=engine)
    with torch.no_grad():
        memory.selector.table[3] = torch.tensor([num_blocks - 1, 0, num_blocks - 2])
    x, _ = tokens(1)
    out = memory(x, torch.tensor([3]))
    assert out.selection.blocks.tolist() == [[num_blocks - 1, 0, num_blocks - 2]]
    cells = [-1, 0, -2]
    hidden = (x @ memory.keys[cells].t() + memory.key_bias[cells]).relu()
    close(out.output, hidden @ memory.values[cells] + memory.value_bias)
    assert out.usage.counts[cells].tolist() == [1, 1, 1] and out.usage.counts.sum() == 3


def test_the_token_id_alone_chooses():
    memory, (x, token_ids) = build("rand_hash"), tokens(50)
    for hidden in (x, 10 * x):
        blocks_NA = memory(hidden, token_ids).selection.blocks
        assert blocks_NA.dtype == torch.int64
        assert torch.equal(blocks_NA, memory.selector.table[token_ids[:, 1]].long())


def test_the_table_is_stored_restored_and_no_parameter():
    memory, other = build("rand_hash", vocab_size=40), build("rand_hash", vocab_size=40)
    assert not torch.equal(memory.selector.table, other.selector.table)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(memory.selector.table, other.selector.table)
    assert list(memory.selector.parameters()) == []
    assert memory.bfloat16().selector.table.dtype == torch.int16


def test_a_table_of_other_active_blocks_is_refused():
    stored = build("rand_hash", active_blocks=2).state_dict()
    with pytest.raises(RuntimeError, match=r"selector\.table"):
        build("rand_hash", active_blocks=3).load_state_dict(stored)


@pytest.mark.parametrize("bad", [-1, VOCAB_SIZE, 10**6])
def test_ids_out_of_range_are_refused_in_one_line(bad):
    memory, (x, token_ids) = build("rand_hash"), tokens(2, 3)
    token_ids[1, 1, 1] = bad
    with pytest.raises(ConfigError, match=f"vocab_size {VOCAB_SIZE}: .*{bad}") as caught:
        memory(x, token_ids)
    assert "\n" not in str(caught.value)


def test_one_block_of_the_table_of_a_hash_layer_is_a_hash_layer():
    memory = build("rand_hash", num_cells=32, block_size=8, active_blocks=1)
    layer = build("hash_layer")
    state = {**memory.state_dict(), "selector.table": memory.selector.table[:, 0].long()}
    layer.load_state_dict(state)
    x, token_ids = tokens(3, 7)
    results = []
    for module in (memory, layer):
        x_ = x.clone().requires_grad_()
        out = module(x_, token_ids)
        out.output.square().sum().backward()
        results.append([out.output, x_.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, tolerance=0)


def test_scores_and_losses_are_absent():
    out = build("rand_hash")(*tokens(4))
    assert out.selection.scores is out.selection.weights is None
    assert out.balance_loss is out.z_loss is None


def test_defaults():
    assert (RandHash.default_gate, RandHash.default_block_size(512)) == ("none", 64)
    assert RandHash.default_balance_weight == 0.0
