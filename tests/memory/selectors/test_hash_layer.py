import pytest
import torch
from oracle import VOCAB_SIZE, build, close, tokens

from fairseq_sffn.memory import ConfigError
from fairseq_sffn.memory.selectors.hash_layer import HashLayer, balanced_table

BALANCED = HashLayer.Config(table="balanced")


def loads(table_V, counts, num_blocks):
    counts_V = torch.tensor(counts)
    return torch.zeros(num_blocks, dtype=torch.int64).scatter_add_(0, table_V, counts_V)


def zipf(vocab_size):
    return [10**7 // (rank + 1) for rank in range(vocab_size)]


def test_the_token_id_alone_chooses():
    memory, token_ids = build("hash_layer"), torch.randint(VOCAB_SIZE, (50,))
    blocks = [memory(tokens(50)[0], token_ids).selection.blocks for _ in range(2)]
    assert torch.equal(*blocks)
    assert torch.equal(blocks[0].flatten(), memory.selector.table[token_ids])


def test_the_table_is_stored_and_restored():
    memory, other = build("hash_layer"), build("hash_layer")
    table = memory.state_dict()["selector.table"].clone()
    assert not torch.equal(other.selector.table, table)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.selector.table, table)
    x, token_ids = tokens(20)
    close(other(x, token_ids).output, memory(x, token_ids).output, tolerance=0)


def test_the_table_is_no_parameter_and_keeps_its_dtype():
    memory = build("hash_layer", torch.bfloat16)
    assert "selector.table" not in dict(memory.named_parameters())
    assert memory.selector.table.dtype == torch.int64


def test_the_current_token_is_the_last_of_the_trailing_ones():
    memory, (x, trailing) = build("hash_layer"), tokens(2, 5)
    blocks = memory(x, trailing).selection.blocks
    assert torch.equal(blocks, memory(x, trailing[..., -1]).selection.blocks)


@pytest.mark.parametrize("bad", [-1, VOCAB_SIZE, 10**6])
def test_ids_out_of_range_are_refused_in_one_line(bad):
    memory, (x, token_ids) = build("hash_layer"), tokens(2, 3)
    token_ids[1, 1] = bad
    with pytest.raises(ConfigError, match=f"vocab_size {VOCAB_SIZE}: .*{bad}") as caught:
        memory(x, token_ids)
    assert "\n" not in str(caught.value)


def test_random_tables_use_every_block_about_equally():
    memory = build("hash_layer", vocab_size=40_000)
    counts = torch.bincount(memory.selector.table, minlength=4)
    assert (counts - 10_000).abs().max() < 500  # 5.8 standard deviations


def test_scores_and_losses_are_absent():
    out = build("hash_layer")(*tokens(4))
    assert out.selection.scores is out.selection.weights is None
    assert out.balance_loss is out.z_loss is None


# Balanced tables


@pytest.mark.parametrize("num_blocks", [2, 4])
def test_a_balanced_table_balances_zipf_counts(num_blocks):
    counts = zipf(2000)
    per_block = loads(balanced_table(counts, num_blocks), counts, num_blocks)
    assert per_block.max() / per_block.double().mean() < 1.001


def test_a_token_above_the_fair_share_has_its_block_to_itself():
    counts = zipf(2000)  # the first has 12 % of the tokens, a block of 16 should have 6.25 %
    table_V = balanced_table(counts, 16)
    assert (table_V == table_V[0]).sum() == 1
    per_block = loads(table_V, counts, 16)
    assert per_block.max() == counts[0]
    rest = per_block[torch.arange(16) != table_V[0]].double()
    assert rest.max() / rest.mean() < 1.05


def test_a_balanced_table_does_not_depend_on_the_order_of_the_ids():
    counts = zipf(500)
    order = torch.randperm(500).tolist()
    shuffled = [counts[i] for i in order]
    sorted_loads = [
        loads(balanced_table(c, 4), c, 4).sort().values.tolist() for c in (counts, shuffled)
    ]
    assert sorted_loads[0] == sorted_loads[1]


def test_ids_that_never_occur_are_spread_where_loads_are_equal():
    assert torch.bincount(balanced_table([0] * 40, 4)).tolist() == [10] * 4
    assert torch.bincount(balanced_table([7] * 4 + [0] * 40, 4)).tolist() == [11] * 4


@pytest.mark.parametrize("counts", [[5, 3], zipf(50)])
def test_ids_that_never_occur_are_spread(counts):
    never = 400
    table_V = balanced_table(counts + [0] * never, 2)
    assert torch.bincount(table_V[len(counts) :], minlength=2).min() > 0.4 * never


def test_a_memory_takes_its_table_from_the_counts():
    counts = zipf(30)
    memory = build("hash_layer", selector=BALANCED, vocab_size=30, token_counts=counts)
    assert torch.equal(memory.selector.table, balanced_table(counts, 4))
    token_ids = torch.arange(30).repeat_interleave(torch.tensor(counts) // 10**5)
    usage = memory(torch.zeros(len(token_ids), 8, dtype=torch.float64), token_ids).usage
    assert usage.counts.max() / usage.counts.double().mean() < 1.05


def test_fewer_ids_than_blocks():
    assert sorted(balanced_table([3, 2, 1], 8).tolist()) == [0, 1, 2]
