import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_sffn.memory.selectors.pkm import PKM
from fairseq_sffn.memory.selectors.pkm_ffn import PKMFFN
from fairseq_sffn.memory.selectors.product_keys import sub_key_counts
from tests.memory.cases import build, close, tokens


def dense_scores(memory, x_ND):
    """Compute the scores (N, H, C) of all cells, from a dense key for each: its two sub-keys side
    by side."""
    selector, cells = memory.selector, memory.config.num_cells
    heads, left, _ = selector.left.shape
    query_NHq = F.linear(x_ND, selector.query.weight, selector.query.bias).unflatten(1, (heads, -1))
    if isinstance(selector.norm, nn.LayerNorm):
        query_NHq = F.layer_norm(
            query_NHq, query_NHq.shape[-1:], selector.norm.weight, selector.norm.bias
        )
    keys_HCq = torch.cat(
        [
            selector.left.repeat_interleave(cells // left, dim=1),
            selector.right.repeat(1, left, 1),
        ],
        dim=2,
    )
    return torch.einsum("nhq,hcq->nhc", query_NHq, keys_HCq)


def assert_same(actual, expected, inputs):
    close(actual, expected)
    cotangent = torch.randn_like(expected)
    options = dict(allow_unused=True, materialize_grads=True)
    for got, wanted in zip(
        torch.autograd.grad(actual, inputs, cotangent, **options),
        torch.autograd.grad(expected, inputs, cotangent, **options),
        strict=True,
    ):
        close(got, wanted, "gradient")


@pytest.mark.parametrize("query_norm", ["layer", "none"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("num_cells", "active"), [(24, 6), (7, 4), (25, 10)])
@pytest.mark.parametrize("coefficients", ["softmax", "activation"])
def test_pkm_is_a_sum_over_heads_of_the_best_of_all_cells(
    coefficients, num_cells, active, heads, query_norm
):
    options = PKM.Config(heads=heads, coefficients=coefficients, query_norm=query_norm)
    memory = build("pkm", selector=options, num_cells=num_cells, active_blocks=active)
    x = tokens(9)[0].requires_grad_()
    output = memory(x).output
    scores_NHC = dense_scores(memory, x)
    used_NHC = torch.zeros_like(scores_NHC)
    used_NHC.scatter_(2, scores_NHC.topk(active // heads).indices, 1.0)
    if coefficients == "softmax":
        hidden_NHC = scores_NHC.masked_fill(used_NHC == 0, -torch.inf).softmax(dim=2)
    else:
        hidden_NHC = scores_NHC.relu() * used_NHC
    expected = hidden_NHC.sum(dim=1) @ memory.values + memory.value_bias
    assert_same(output, expected, (x, *memory.parameters()))


@pytest.mark.parametrize("gate", ["none", "softmax", "renormalized", "sigmoid"])
def test_pkm_ffn_is_the_ffn_of_the_best_cells(gate):
    memory = build("pkm_ffn", gate=gate)
    x = tokens(9)[0].requires_grad_()
    output = memory(x).output
    scores_NC = dense_scores(memory, x).squeeze(1)
    top = scores_NC.topk(5).indices
    used_NC = torch.zeros_like(scores_NC).scatter(1, top, 1.0)
    weights_NC = {
        "none": used_NC,
        "softmax": scores_NC.softmax(dim=1),
        "renormalized": scores_NC.masked_fill(used_NC == 0, -torch.inf).softmax(dim=1),
        "sigmoid": scores_NC.sigmoid(),
    }[gate]
    hidden_NC = F.linear(x, memory.keys, memory.key_bias).relu() * weights_NC * used_NC
    expected = hidden_NC @ memory.values + memory.value_bias
    assert_same(output, expected, (x, *memory.parameters()))


def test_the_query_of_pkm_ffn_learns_by_default():
    memory = build("pkm_ffn")
    memory(tokens(9)[0]).output.square().sum().backward()
    for name, parameter in memory.selector.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_one_head_with_activation_is_vanilla_m_by_product_keys():
    """With keys that are products, VanillaM selects and computes the same."""
    options = PKM.Config(heads=1, coefficients="activation", query_norm="none", query_dim=8)
    memory = build("pkm", selector=options, num_cells=24, active_blocks=6)
    direct = build("vanilla_m-g1", num_cells=24, active_blocks=6)
    selector = memory.selector
    with torch.no_grad():
        selector.query.bias.zero_()
        keys_CD = dense_scores(memory, torch.eye(8).double()).squeeze(1).t()
        direct.keys.copy_(keys_CD)
        direct.key_bias.zero_()
        direct.values.copy_(memory.values)
        direct.value_bias.copy_(memory.value_bias)
    x = tokens(12)[0].requires_grad_()
    ours, theirs = memory(x), direct(x)
    assert torch.equal(ours.selection.blocks, theirs.selection.blocks)
    close(ours.balance_loss, theirs.balance_loss)
    close(ours.z_loss, theirs.z_loss)
    cotangent = torch.randn_like(x)
    close(ours.output, theirs.output)
    close(
        torch.autograd.grad(ours.output, x, cotangent)[0],
        torch.autograd.grad(theirs.output, x, cotangent)[0],
    )


def test_heads_that_agree_count_twice():
    memory = build("pkm", active_blocks=2)  # one cell per head, whose coefficient is 1
    with torch.no_grad():
        for parameter in (memory.selector.left, memory.selector.right):
            parameter[1] = parameter[0]
        half = len(memory.selector.query.weight) // 2
        memory.selector.query.weight[half:] = memory.selector.query.weight[:half]
        memory.selector.query.bias[half:] = memory.selector.query.bias[:half]
    out = memory(tokens(9)[0])
    blocks_NA = out.selection.blocks
    assert torch.equal(blocks_NA[:, 0], blocks_NA[:, 1])
    close(out.output, 2 * memory.values[blocks_NA[:, 0]] + memory.value_bias)
    assert out.usage.counts.sum() == 18


@pytest.mark.parametrize(
    ("num_cells", "wanted"),
    [(1, (1, 1)), (2, (1, 2)), (7, (1, 7)), (12, (3, 4)), (36, (6, 6)), (8192, (64, 128))],
)
def test_sub_keys_are_as_even_as_can_be(num_cells, wanted):
    assert sub_key_counts(num_cells) == wanted


@pytest.mark.parametrize("num_cells", range(1, 60))
def test_sub_keys_make_all_cells(num_cells):
    left, right = sub_key_counts(num_cells)
    assert left * right == num_cells and left <= right
    between = range(left + 1, right)
    assert not any(num_cells % n == 0 for n in between)


@pytest.mark.parametrize(("embed_dim", "query_dim"), [(8, 4), (10, 4), (12, 6), (2, 2), (1, 2)])
def test_a_query_is_half_as_wide_by_default(embed_dim, query_dim):
    memory = build("pkm_ffn", embed_dim=embed_dim)
    assert memory.selector.query.weight.shape == (query_dim, embed_dim)
    assert memory(torch.randn(3, embed_dim).double()).output.shape == (3, embed_dim)
    assert memory.config.num_params() == sum(p.numel() for p in memory.parameters())


def test_all_cells_start_alike():
    memory = build("pkm_ffn", embed_dim=64, num_cells=256, active_blocks=16)
    counts = memory(torch.randn(2000, 64).double()).usage.counts
    assert (counts > 0).all()
    assert counts.max() < 8 * counts.double().mean()


def test_defaults():
    assert (PKM.default_gate, PKM.default_block_size(512), PKM.key_table) == ("none", 1, "own")
    assert (PKMFFN.default_gate, PKMFFN.default_block_size(512)) == ("sigmoid", 1)
    assert PKM.default_balance_weight == PKMFFN.default_balance_weight == 0.0
    assert PKM.Config().heads == 4
    memory = build("pkm")
    assert memory.keys is memory.key_bias is None


def test_capacity_is_as_scarce_for_every_head():
    """Heads take turns, best cells first, so no head waits for another head's whole demand."""
    options = PKM.Config(heads=4)
    memory = build(
        selector=options, num_cells=64, block_size=1, active_blocks=16, capacity_factor=0.5
    )
    kept = memory(tokens(200)[0]).selection.kept.double().unflatten(1, (4, 4))
    by_rank, by_head = kept.mean(dim=(0, 2)), kept.mean(dim=(0, 1))
    assert by_rank.sort(descending=True).indices.tolist() == [0, 1, 2, 3]
    assert by_head.max() - by_head.min() < 0.2
