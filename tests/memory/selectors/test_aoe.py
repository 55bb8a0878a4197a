import pytest
import torch

from fairseq_sffn.memory.compute import selected_products as products
from fairseq_sffn.memory.compute.selected_products import selected_products
from fairseq_sffn.memory.selectors.aoe import AoE
from fairseq_sffn.memory.selectors.vanilla_m import VanillaM
from tests.memory.cases import build, close, tokens


def test_defaults():
    assert [AoE.default_block_size(width) for width in (512, 1)] == [256, 1]
    assert (AoE.default_gate, AoE.default_balance_weight) == ("none", 0.0)


@pytest.mark.parametrize(
    ("sizes", "rank"),
    [
        (dict(num_cells=512, block_size=16, active_blocks=2), 1),
        (dict(num_cells=64, block_size=16, active_blocks=2), 8),
        (dict(num_cells=64, block_size=4, active_blocks=4), 1),
        (dict(num_cells=32, block_size=4, active_blocks=8), 4),
        (dict(num_cells=32, block_size=16, active_blocks=2), 8),
    ],
)
def test_by_default_the_first_factors_cost_what_the_keys_of_a_dense_ffn_cost(sizes, rank):
    memory = build("aoe", selector="aoe", **sizes)
    assert memory.selector.down.shape[1] == memory.selector.up.shape[2] == rank
    assert memory.keys is memory.key_bias is None


@pytest.mark.parametrize("gate", ["none", "softmax", "sigmoid_renormalized"])
@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_without_factors_it_is_vanilla_m_with_l2(block_size, gate):
    sizes = dict(num_cells=32, block_size=block_size, active_blocks=2, bias=False, gate=gate)
    vanilla = build(selector=VanillaM.Config("l2"), **sizes)
    memory = build(selector=AoE.Config(rank=block_size), **sizes)
    with torch.no_grad():
        memory.selector.down.copy_(vanilla.keys.unflatten(0, (-1, block_size)))
        memory.selector.up.copy_(torch.eye(block_size))
        memory.values.copy_(vanilla.values)
    x, _ = tokens(12)
    results = []
    for module in (memory, vanilla):
        out = module(x_ := x.clone().requires_grad_())
        keys = memory.selector.down if module is memory else vanilla.keys
        total = out.output.square().sum() + out.balance_loss + out.z_loss
        grads = torch.autograd.grad(total, (x_, module.values, keys))
        results.append((out, [*grads[:2], grads[2].reshape(32, 8)]))
    (out, grads), (other, other_grads) = results
    assert torch.equal(out.selection.blocks, other.selection.blocks)
    for got, wanted in (
        (out.output, other.output),
        (out.balance_loss, other.balance_loss),
        (out.selection.scores.logits, other.selection.scores.logits),
        (out.selection.pre_activations, other.selection.pre_activations),
        *zip(grads, other_grads, strict=True),
    ):
        close(got, wanted)


def test_the_factors_of_a_block_are_those_of_its_keys():
    """A block computes with the keys U_i D_i, of rank r."""
    memory, (x, token_ids) = build("aoe"), tokens(12)
    selector = memory.selector
    keys_CD = (selector.up @ selector.down).flatten(0, 1)
    selection = memory(x, token_ids).selection
    pre_NBG = (x @ keys_CD.t()).unflatten(1, (8, 3)) + selector.bias
    wanted = torch.stack([pre_NBG[n, blocks] for n, blocks in enumerate(selection.blocks)])
    close(selection.pre_activations, wanted)
    assert torch.linalg.matrix_rank(selector.up[0] @ selector.down[0]) == 2


def test_the_bias_is_no_part_of_the_score():
    memory, (x, _) = build("aoe"), tokens(12)
    before = memory(x).selection
    with torch.no_grad():
        memory.selector.bias[3] += 100
    after = memory(x).selection
    assert torch.equal(after.blocks, before.blocks)
    assert (after.blocks == 3).any()
    assert torch.equal(
        after.pre_activations != before.pre_activations,
        (after.blocks == 3).unsqueeze(2).expand(-1, -1, 3),
    )


@pytest.mark.parametrize("init_scale", [1.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_it_starts_with_pre_activations_of_a_full_table(bias, init_scale):
    sizes = dict(embed_dim=64, num_cells=4096, block_size=64, active_blocks=64)
    options = dict(init_scale=init_scale, bias=bias, **sizes)
    full = build("vanilla_m-avg", torch.float32, **options)
    low_rank = build("aoe", torch.float32, **options)
    x = torch.randn(64, 64)
    spreads = [m(x).selection.pre_activations.std() for m in (full, low_rank)]
    torch.testing.assert_close(*spreads, rtol=0.2, atol=0)


def test_a_gate_weighs_by_the_norms():
    memory, (x, _) = build("aoe", gate="renormalized"), tokens(12)
    selection = memory(x).selection
    norms_NB = torch.einsum("nd,brd->nbr", x, memory.selector.down).norm(dim=2)
    close(selection.weights, norms_NB.gather(1, selection.blocks).softmax(dim=1))


# The products


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "engine", [None, "loop", "native_loop", "grouped", "tiled", "embedding_bag"]
)
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("num_tokens", "active"), [(0, 2), (1, 1), (7, 3), (50, 4)])
def test_products_are_those_of_loops(num_tokens, active, compiling, engine, with_bias, monkeypatch):
    """``torch.compile`` and accelerators multiply tiles."""
    monkeypatch.setattr(products.torch.compiler, "is_compiling", lambda: compiling)
    rows_NAX, table_BGX = torch.randn(num_tokens, active, 3).double(), torch.randn(5, 4, 3).double()
    bias_BG = torch.randn(5, 4).double() if with_bias else None
    blocks_NA = torch.rand(num_tokens, 5).topk(active).indices
    tensors = [t.requires_grad_() for t in (rows_NAX, table_BGX, bias_BG) if t is not None]
    got = selected_products(rows_NAX.flatten(0, 1), table_BGX, bias_BG, blocks_NA, engine)
    assert got.shape == (num_tokens, active, 4)
    wanted = torch.zeros(num_tokens, active, 4).double()
    for n, blocks in enumerate(blocks_NA.tolist()):
        for a, i in enumerate(blocks):
            wanted[n, a] = table_BGX[i] @ rows_NAX[n, a] + (0 if bias_BG is None else bias_BG[i])
    close(got, wanted)
    if num_tokens:
        cotangent = torch.randn_like(got)
        for ours, theirs in zip(
            torch.autograd.grad(got, tensors, cotangent),
            torch.autograd.grad(wanted, tensors, cotangent),
            strict=True,
        ):
            close(ours, theirs)
