import pytest
import torch

from fairseq_sffn.memory import ConfigError, SelectorInput
from fairseq_sffn.memory.selectors.hash_moe import HashMoE, balanced_blocks
from tests.memory.cases import VOCAB_SIZE, build, close, tokens


def test_defaults():
    assert (HashMoE.default_gate, HashMoE.default_block_size(512)) == (
        "sqrt_softplus_renormalized",
        64,
    )
    assert HashMoE.default_balance_weight == 0.0 and not HashMoE.selects_by_scores


def compare_with_a_zero_router(memory, other, factor, x, token_ids):
    """Compare outputs and gradients of the tables with those of a hash without weights."""
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            getattr(memory, name).copy_(parameter)
        memory.selector.router.zero_()
        memory.selector.table.copy_(other.selector.table.view(VOCAB_SIZE, -1))
    cotangent, results = torch.randn_like(x), []
    for module, scale in ((memory, 1), (other, factor)):
        out = module(x_ := x.clone().requires_grad_(), token_ids)
        names = ("keys", "key_bias", "values")
        tensors = [x_, *(getattr(module, name) for name in names)]
        result = scale * (out.output - module.value_bias)
        grads = torch.autograd.grad((result * cotangent).sum(), tensors)
        results.append({"output": result, **dict(zip(("x", *names), grads, strict=True))})
    for name, tensor in results[0].items():
        close(tensor, results[1][name], name, 1e-12)


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("active_blocks", [2, 3, 8])
def test_with_a_zero_router_it_is_rand_hash(active_blocks, scale):
    sizes = dict(num_cells=24, block_size=3, active_blocks=active_blocks)
    memory, other = build("hash_moe", route_scale=scale, **sizes), build("rand_hash", **sizes)
    x, token_ids = tokens(12)
    compare_with_a_zero_router(memory, other, scale / active_blocks, x, token_ids)
    weights_NA = memory(x, token_ids).selection.weights
    close(weights_NA, torch.full_like(weights_NA, scale / active_blocks))


def test_with_a_zero_router_and_one_block_it_is_hash_layer():
    sizes = dict(num_cells=32, block_size=8, active_blocks=1)
    memory, other = build("hash_moe", route_scale=1.5, **sizes), build("hash_layer", **sizes)
    compare_with_a_zero_router(memory, other, 1.5, *tokens(12))


def test_the_token_id_chooses_and_the_router_weighs():
    memory, (x, token_ids) = build("hash_moe"), tokens(40)
    (other_x, _), before = tokens(40), memory(x, token_ids).selection
    after = memory(other_x, token_ids).selection
    assert torch.equal(before.blocks, memory.selector.table[token_ids[:, -1]].long())
    assert torch.equal(after.blocks, before.blocks)
    assert not torch.allclose(after.weights, before.weights)
    logits_NB = x @ memory.selector.router.t()
    close(before.scores.logits, logits_NB)
    roots = logits_NB.gather(1, before.blocks).exp().log1p().sqrt()
    close(before.weights, roots / roots.sum(dim=1, keepdim=True))
    with torch.no_grad():
        memory.selector.router.normal_(std=10)
    assert torch.equal(memory(x, token_ids).selection.blocks, before.blocks)


def test_only_the_weights_train_the_router():
    memory, (x, token_ids) = build("hash_moe"), tokens(30)
    (grad,) = torch.autograd.grad(
        memory(x, token_ids).output.square().sum(), memory.selector.router
    )
    used = memory.selector.table[token_ids[:, -1]].unique()
    assert (grad != 0).any(dim=1).nonzero().flatten().tolist() == used.tolist()


@pytest.mark.parametrize("bad", [-1, VOCAB_SIZE])
def test_ids_out_of_range_are_refused_in_one_line(bad):
    memory, (x, token_ids) = build("hash_moe"), tokens(2, 3)
    token_ids[1, 1] = bad
    with pytest.raises(ConfigError, match=f"^vocab_size {VOCAB_SIZE}: .*{bad}$"):
        memory(x, token_ids)


def test_the_table_is_stored_and_restored():
    memory, other = build("hash_moe"), build("hash_moe")
    assert not torch.equal(memory.selector.table, other.selector.table)  # layers differ
    assert "selector.table" not in dict(memory.named_parameters())
    other.load_state_dict(memory.state_dict())
    x, token_ids = tokens(20)
    close(other(x, token_ids).output, memory(x, token_ids).output, tolerance=0)
    with pytest.raises(RuntimeError, match=r"selector\.table"):
        build("hash_moe", active_blocks=2).load_state_dict(memory.state_dict())


# Tables


def zipf(vocab_size):
    return [10**7 // (rank + 1) for rank in range(vocab_size)]


def loads(table_VA, counts, num_blocks):
    counts_VA = torch.tensor(counts).unsqueeze(1).expand(table_VA.shape)
    loads_B = torch.zeros(num_blocks, dtype=torch.int64)
    return loads_B.scatter_add_(0, table_VA.long().flatten(), counts_VA.flatten())


@pytest.mark.parametrize(
    ("num_blocks", "active"), [(1, 1), (8, 8), (16, 1), (16, 2), (64, 8), (40, 30)]
)
def test_blocks_of_an_id_are_distinct(num_blocks, active):
    table_VA = balanced_blocks(zipf(300), num_blocks, active)
    assert table_VA.shape == (300, active) and table_VA.dtype == torch.int16
    assert table_VA.min() >= 0 and table_VA.max() < num_blocks
    assert all(len(set(row)) == active for row in table_VA.tolist())


def test_more_than_32768_blocks():
    table_VA = balanced_blocks([3, 2], 2**15 + 1, 2)
    assert table_VA.dtype == torch.int32 and table_VA.min() >= 0


@pytest.mark.parametrize(("num_blocks", "active"), [(16, 2), (64, 8)])
def test_loads_are_even(num_blocks, active):
    counts = zipf(3000)
    loads_B = loads(balanced_blocks(counts, num_blocks, active), counts, num_blocks)
    fair = sum(counts) * active / num_blocks
    assert counts[0] < 1.0001 * max(fair, int(loads_B.max()))
    for load in loads_B.tolist():  # a block of the most frequent id may have that id alone
        assert load < 1.005 * fair or load <= counts[0] * 1.001
    random_B = loads(torch.rand(3000, num_blocks).topk(active).indices, counts, num_blocks)
    assert loads_B.double().std() < 0.35 * random_B.double().std()


def test_ids_share_different_blocks():
    """With too even a choice, the same blocks would always go together, as one large block."""
    table_VA = balanced_blocks(zipf(2000), 16, 2).sort().values
    pairs, counts = table_VA.unique(dim=0, return_counts=True)
    assert len(pairs) > 0.9 * 16 * 15 / 2 and counts.max() < 4 * 2000 / 120


def test_ids_that_never_occur_are_spread():
    table_VA = balanced_blocks(zipf(50) + [0] * 1000, 16, 2)
    never_B = torch.bincount(table_VA[50:].long().flatten(), minlength=16)
    assert never_B.min() > 0.8 * 125 and never_B.max() < 1.2 * 125


def test_the_order_of_ids_does_not_matter():
    counts = zipf(500)
    order = torch.randperm(500)
    torch.manual_seed(1)
    table_VA = balanced_blocks(counts, 16, 2)
    torch.manual_seed(1)
    shuffled_VA = balanced_blocks([counts[i] for i in order.tolist()], 16, 2)
    assert torch.equal(shuffled_VA, table_VA[order])


def test_the_generator_of_torch_decides():
    tables = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        tables.append(balanced_blocks(zipf(100), 16, 2))
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


# transformers' router


def test_deepseek_v4_weighs_alike():
    deepseek = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    configuration = pytest.importorskip("transformers.models.deepseek_v4.configuration_deepseek_v4")
    config = configuration.DeepseekV4Config(
        hidden_size=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        routed_scaling_factor=1.5,
        vocab_size=VOCAB_SIZE,
    )
    router = deepseek.DeepseekV4HashRouter(config)
    memory, (x, token_ids) = build("hash_moe", torch.float32, route_scale=1.5), tokens(20)
    with torch.no_grad():
        router.weight.copy_(memory.selector.router)
        router.tid2eid.copy_(memory.selector.table)
        _, weights, blocks = router(x.float(), token_ids[:, -1])
    selection = memory(x.float(), token_ids).selection
    assert torch.equal(selection.blocks, blocks)
    close(selection.weights, weights, tolerance=1e-6)


def test_padding_and_no_tokens():
    memory = build("hash_moe")
    assert memory.selector(
        SelectorInput(torch.zeros(0, 8).double(), token_ids=torch.zeros(0, 1).long())
    ).blocks.shape == (0, 3)
