import pytest
import torch

from fairseq_sffn.memory import ConfigError, SelectorInput
from fairseq_sffn.memory.selectors.hash_layer import HashLayer, balanced_table
from tests.memory.cases import VOCAB_SIZE, build, close, tokens

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


def test_a_balanced_table_needs_counts():
    with pytest.raises(
        ConfigError, match=r"^table balanced: needs .*\(MemoryConfig\.token_counts\)$"
    ):
        build(selector=BALANCED, active_blocks=1, token_counts=None)


def test_a_memory_takes_its_table_from_the_counts():
    counts = zipf(30)
    memory = build("hash_layer", selector=BALANCED, vocab_size=30, token_counts=counts)
    assert torch.equal(memory.selector.table, balanced_table(counts, 4))
    token_ids = torch.arange(30).repeat_interleave(torch.tensor(counts) // 10**5)
    usage = memory(torch.zeros(len(token_ids), 8, dtype=torch.float64), token_ids).usage
    assert usage.counts.max() / usage.counts.double().mean() < 1.05


def test_fewer_ids_than_blocks():
    assert sorted(balanced_table([3, 2, 1], 8).tolist()) == [0, 1, 2]


def test_one_id():
    for table in ("random", "balanced", "bigram"):
        options = dict(selector=HashLayer.Config(table=table), vocab_size=1, token_counts=[5])
        memory, (x, _) = build("hash_layer", **options), tokens(6)
        blocks_NA = memory(x, torch.zeros(6, 2, dtype=torch.int64)).selection.blocks
        assert len(blocks_NA.unique()) == 1


# Bigram tables


def bigram_blocks(memory, vocab_size=VOCAB_SIZE):
    """Return the block of each bigram: (V, V), the current id last."""
    ids = torch.arange(vocab_size)
    pairs = torch.cartesian_prod(ids, ids)
    selection = memory.selector(SelectorInput(torch.zeros(len(pairs), 8), token_ids=pairs))
    return selection.blocks.view(vocab_size, vocab_size)


def test_a_bigram_chooses_by_both_ids_and_their_order():
    blocks_VV = bigram_blocks(build("hash_layer-bigram", num_cells=128, block_size=2))
    assert (blocks_VV != blocks_VV[:1]).any() and (blocks_VV != blocks_VV[:, :1]).any()
    # Of 45 pairs, 1 in 64 has one block for both orders.
    upper = torch.ones_like(blocks_VV).triu(1).bool()
    assert (blocks_VV == blocks_VV.t())[upper].sum() <= 5
    assert blocks_VV.min() >= 0 and blocks_VV.max() < 64


@pytest.mark.parametrize("num_blocks", [4, 6, 7])
def test_bigrams_use_every_block_about_equally(num_blocks):
    memory = build(
        "hash_layer-bigram", num_cells=num_blocks, block_size=1, vocab_size=500
    )  # 250,000 bigrams
    blocks_VV = bigram_blocks(memory, 500)
    counts = torch.bincount(blocks_VV.flatten(), minlength=num_blocks)
    assert len(counts) == num_blocks
    assert (counts / counts.double().mean() - 1).abs().max() < 0.02
    # The blocks after one id, and before one id, are used equally too.
    for rows in (blocks_VV, blocks_VV.t()):
        for row in rows[:20]:
            shares = torch.bincount(row, minlength=num_blocks) / 500
            assert (shares - 1 / num_blocks).abs().max() < 5 * (0.25 / 500) ** 0.5


def test_two_bigrams_share_a_block_as_often_as_by_chance():
    blocks_VV = bigram_blocks(build("hash_layer-bigram", vocab_size=400), 400)
    pairs = torch.randint(400, (4000, 2))
    others = torch.randint(400, (4000, 2))
    alike = blocks_VV[pairs[:, 0], pairs[:, 1]] == blocks_VV[others[:, 0], others[:, 1]]
    assert abs(alike.double().mean() - 0.25) < 0.04


def test_a_bigram_table_is_small_stored_and_restored():
    memory, other = (build("hash_layer-bigram", vocab_size=50) for _ in range(2))
    assert memory.selector.table.shape == (2, 50)
    assert not torch.equal(bigram_blocks(memory, 50), bigram_blocks(other, 50))
    other.load_state_dict(memory.state_dict())
    assert torch.equal(bigram_blocks(memory, 50), bigram_blocks(other, 50))


def test_other_tables_are_refused():
    stored = build("hash_layer-bigram").state_dict()
    with pytest.raises(RuntimeError, match=r"selector\.table"):
        build("hash_layer").load_state_dict(stored)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("bad", [-1, VOCAB_SIZE])
def test_bigrams_out_of_range_are_refused(bad, place):
    memory, (x, token_ids) = build("hash_layer-bigram"), tokens(4)
    token_ids[2, place] = bad
    with pytest.raises(ConfigError, match=f"vocab_size {VOCAB_SIZE}: .*{bad}"):
        memory(x, token_ids)


def test_bigrams_need_two_ids():
    memory, (x, token_ids) = build("hash_layer-bigram"), tokens(4)
    with pytest.raises(ValueError, match="token_ids"):
        memory(x, token_ids[:, 1])
    assert memory.config.context_tokens == 2
