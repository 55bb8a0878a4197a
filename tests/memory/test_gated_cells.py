"""Gated cells, against a dense SwiGLU or GEGLU FFN and against Mixtral's block.

The loops of :mod:`.oracle` check them with every selector and engine."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_sffn.memory.convert import from_mixtral
from tests.memory.cases import CPU_ENGINES, FULL_KEYS, build, close, tokens

WHOLE = {
    **{case: 4 for case in ("avgk-g4", "vanilla_m-max", "rand_hash", "switch-top2", "gshard")},
    **dict.fromkeys(("moe", "sigma_moe", "hash_moe"), 4),
    **{"pkm_ffn": 1, "hash_layer": 48, "hash_layer-bigram": 48, "base": 48},
}
"""Case -> a block size with which all blocks may be active."""


def test_the_cases_are_every_selector_with_full_keys():
    selectors = {build(case).config.selector_class for case in FULL_KEYS}
    assert {build(case).config.selector_class for case in WHOLE} == selectors


@pytest.mark.parametrize("engine", [None, *CPU_ENGINES])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("glu", "function"), [("silu", F.silu), ("gelu", F.gelu)])
@pytest.mark.parametrize(("case", "block_size"), WHOLE.items())
def test_all_blocks_active_is_a_gated_ffn(case, block_size, glu, function, bias, engine):
    sizes = dict(num_cells=48, block_size=block_size, active_blocks=48 // block_size)
    memory = build(case, glu=glu, gate="none", bias=bias, engine=engine, **sizes)
    gate_proj, up_proj = (nn.Linear(8, 48, bias=bias, dtype=torch.float64) for _ in range(2))
    down_proj = nn.Linear(48, 8, bias=bias, dtype=torch.float64)
    maps = {"key": gate_proj, "up": up_proj, "value": down_proj}
    tables = {"key": "keys", "up": "up", "value": "values"}
    pairs = []
    for name, table in tables.items():
        pairs.append((getattr(memory, table), maps[name].weight))
        if bias:
            pairs.append((getattr(memory, f"{name}_bias"), maps[name].bias))
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.copy_(theirs.t() if ours is memory.values else theirs)

    x, token_ids = tokens(2, 5)
    pairs.append((x.requires_grad_(), x))
    y = memory(x, token_ids).output
    dense_y = down_proj(function(gate_proj(x)) * up_proj(x))
    close(y, dense_y, "output", 1e-12)
    ours, theirs = zip(*pairs, strict=True)
    cotangent = torch.randn_like(y)
    for parameter, grad, wanted in zip(
        ours,
        torch.autograd.grad(y, ours, cotangent),
        torch.autograd.grad(dense_y, theirs, cotangent),
        strict=True,
    ):
        close(grad.t() if parameter is memory.values else grad, wanted, "gradient", 1e-12)


def test_the_second_table_begins_like_the_keys():
    memory = build("avgk-glu", embed_dim=64, num_cells=1024, block_size=64, init_scale=0.5)
    for name in ("keys", "up", "key_bias", "up_bias"):
        table = getattr(memory, name)
        assert 0.06 < table.abs().max() <= 0.5 / 8
    assert not torch.equal(memory.up, memory.keys)


def test_a_cell_without_up_is_zero_and_one_without_weight_adds_its_bias():
    memory, (x, _) = build("avgk-glu"), tokens(8)
    plain = build("avgk-g4", activation="silu")
    plain.load_state_dict({name: memory.state_dict()[name] for name in plain.state_dict()})
    with torch.no_grad():
        memory.up.zero_()
        memory.up_bias.fill_(0.5)
        memory.value_bias.zero_(), plain.value_bias.zero_()
    close(memory(x).output, 0.5 * plain(x).output, tolerance=1e-12)


class Square(nn.Module):
    def forward(self, hidden):
        return hidden.square()


def test_dropout_acts_on_the_product():
    memory, (x, _) = build("avgk-glu", active_blocks=8), tokens(8)
    memory.dropout = Square()  # not linear, so that the order of the operations shows
    product = F.silu(F.linear(x, memory.keys, memory.key_bias))
    product = product * F.linear(x, memory.up, memory.up_bias)
    close(memory(x).output, product.square() @ memory.values + memory.value_bias)


def test_another_function_is_refused_by_the_checkpoint():
    state = build("avgk-glu").state_dict()
    with pytest.raises(RuntimeError, match="glu is silu in the checkpoint and gelu in the model"):
        build("avgk-glu", glu="gelu").load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"glu"'):
        build("avgk-g4").load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"glu"'):
        build("avgk-glu").load_state_dict(build("avgk-g4").state_dict())


@pytest.mark.parametrize("choices", [1, 2])
def test_equals_mixtrals_block(choices):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=8,
        intermediate_size=12,
        num_local_experts=4,
        num_experts_per_tok=choices,
        experts_implementation="eager",
    )
    mixtral = MixtralSparseMoeBlock(config).double()
    for parameter in mixtral.parameters():
        nn.init.normal_(parameter, std=0.5)
    memory = from_mixtral(mixtral, config)

    ours, _ = tokens(3, 7)
    theirs = ours.clone().requires_grad_()
    y, their_y = memory(ours.requires_grad_()).output, mixtral(theirs)
    cotangent = torch.randn_like(y)
    y.backward(cotangent), their_y.backward(cotangent)
    keys_grad, up_grad = mixtral.experts.gate_up_proj.grad.chunk(2, dim=1)
    values_grad = mixtral.experts.down_proj.grad.transpose(1, 2)
    for what, got, wanted in [
        ("output", y, their_y),
        ("gradient of x", ours.grad, theirs.grad),
        ("gradient of the router", memory.selector.router.grad, mixtral.gate.weight.grad),
        ("gradient of keys", memory.keys.grad, keys_grad.flatten(0, 1)),
        ("gradient of up", memory.up.grad, up_grad.flatten(0, 1)),
        ("gradient of values", memory.values.grad, values_grad.flatten(0, 1)),
    ]:
        close(got, wanted, what, 1e-5)  # Mixtral's softmax is in fp32
