"""MoE, against GShard and against the routers of transformers on the same weights."""

import pytest
import torch
from torch import nn

from fairseq_sffn.memory.balance import assignment_counts, balance_loss
from fairseq_sffn.memory.convert import from_deepseek_v3, from_mixtral
from fairseq_sffn.memory.selectors.moe import MoE
from tests.memory.cases import build, close, tokens


def test_defaults():
    assert (MoE.default_gate, MoE.default_block_size(512)) == ("sigmoid_renormalized", 64)
    assert (MoE.default_balance_weight, MoE.balance_loss_kind) == (0.0, "load")
    assert MoE.balanced_choices is None


@pytest.mark.parametrize("with_loss", [False, True])
def test_two_blocks_weighed_by_a_renormalised_softmax_are_gshard(with_loss):
    """GShard's balance loss counts first choices."""
    sizes = dict(num_cells=32, block_size=8, active_blocks=2)
    gshard = build("gshard", **sizes)
    memory = build("moe", gate="renormalized", **sizes)
    memory.load_state_dict(gshard.state_dict())
    x, _ = tokens(20)
    cotangent = torch.randn_like(x)
    grads = []
    for module in (memory, gshard):
        out = module(x_ := x.clone().requires_grad_())
        objective = (out.output * cotangent).sum()
        if with_loss:
            firsts_B = assignment_counts(out.selection.blocks[:, :1], 4, None)
            firsts = balance_loss(out.selection.scores, firsts_B, None)
            objective = objective + 0.1 * (firsts if module is memory else out.balance_loss)
        names, tensors = zip(("x", x_), *module.named_parameters(), strict=True)
        found = torch.autograd.grad(objective, tensors)
        grads.append({"output": out.output, **dict(zip(names, found, strict=True))})
    for name, grad in grads[0].items():
        close(grad, grads[1][name], name, 1e-12)


def test_the_balance_loss_counts_all_choices():
    memory, (x, _) = build("moe"), tokens(50)
    out = memory(x)
    scores_NB = torch.sigmoid(x @ memory.selector.router.t())
    mean_B = (scores_NB / scores_NB.sum(dim=1, keepdim=True)).mean(dim=0)
    shares_B = torch.bincount(out.selection.blocks.flatten(), minlength=8) / 150
    close(out.balance_loss, 8 * (mean_B * shares_B).sum(), tolerance=1e-6)


# transformers' routers


def test_mixtral_weighs_alike():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    configuration = pytest.importorskip("transformers.models.mixtral.configuration_mixtral")
    config = configuration.MixtralConfig(
        hidden_size=8, intermediate_size=3, num_local_experts=8, num_experts_per_tok=3
    )
    block, x = mixtral.MixtralSparseMoeBlock(config), tokens(20, dtype=torch.float32)[0]
    nn.init.normal_(block.gate.weight)
    with torch.no_grad():
        _, weights, blocks = block.gate(x)
    selection = from_mixtral(block, config)(x).selection
    assert torch.equal(selection.blocks, blocks)
    close(selection.weights, weights, tolerance=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_deepseek_v3_weighs_alike(scale):
    """Its groups of experts are one group here."""
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    configuration = pytest.importorskip("transformers.models.deepseek_v3.configuration_deepseek_v3")
    config = configuration.DeepseekV3Config(
        hidden_size=8,
        moe_intermediate_size=3,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=scale,
    )
    block, x = deepseek.DeepseekV3MoE(config), tokens(20, dtype=torch.float32)[0]
    nn.init.normal_(block.gate.weight)
    free = from_deepseek_v3(block, config)(x).selection.blocks.sort().values
    block.gate.e_score_correction_bias.copy_(0.3 * torch.randn(8))
    with torch.no_grad():
        _, weights, blocks = block.gate(x)
    selection = from_deepseek_v3(block, config)(x).selection
    assert not torch.equal(selection.blocks.sort().values, free)
    theirs = torch.zeros(20, 8).scatter(1, blocks, weights)
    ours = torch.zeros(20, 8).scatter(1, selection.blocks, selection.weights)
    close(ours, theirs, tolerance=1e-6)
