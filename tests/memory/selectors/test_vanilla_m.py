import pytest
import torch

from fairseq_sffn.memory.selectors.avgk import AvgK
from fairseq_sffn.memory.selectors.lorkm import LoRKM
from fairseq_sffn.memory.selectors.vanilla_m import VanillaM, aggregated
from tests.memory.cases import build, close, tokens


def assert_same_memory(memory, other, x, token_ids=None):
    """Compare outputs, losses and gradients of x and of the common tables, in both modes."""
    names = [n for n, _ in memory.named_parameters() if n in dict(other.named_parameters())]
    assert {"values", "value_bias"} <= set(names)
    cotangent = torch.randn_like(x)
    for training in (True, False):
        results = []
        for module in (memory, other):
            x_ = x.clone().requires_grad_()
            out = module.train(training)(x_, token_ids)
            total = (out.output * cotangent).sum()
            if out.balance_loss is not None:
                total = total + out.balance_loss + out.z_loss
            tables = dict(module.named_parameters())
            grads = torch.autograd.grad(total, [x_, *(tables[name] for name in names)])
            results.append((out, dict(zip(["x", *names], grads, strict=True))))
        (out, grads), (other_out, other_grads) = results
        assert torch.equal(out.selection.blocks, other_out.selection.blocks)
        close(out.output, other_out.output, "output")
        assert (out.balance_loss is None) == (other_out.balance_loss is None)
        if out.balance_loss is not None:
            close(out.balance_loss, other_out.balance_loss)
            close(out.z_loss, other_out.z_loss)
        for name, grad in grads.items():
            close(grad, other_grads[name], f"gradient of {name}")


@pytest.mark.parametrize("gate", ["none", "softmax", "renormalized", "sigmoid"])
@pytest.mark.parametrize("block_size", [1, 2, 8, 32])
def test_the_mean_of_a_block_is_avgk(block_size, gate):
    sizes = dict(
        num_cells=32, block_size=block_size, active_blocks=max(1, 8 // block_size), gate=gate
    )
    memory = build(selector="vanilla_m", **sizes)
    avgk = build(selector="avgk", **sizes)
    avgk.load_state_dict(memory.state_dict())
    assert_same_memory(memory, avgk, tokens(3, 6)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_without_bias_it_is_avgk_without(bias):
    memory = build(selector="vanilla_m", bias=False)
    avgk = build(selector=AvgK.Config(exclude_bias=bias), bias=False)
    avgk.load_state_dict(memory.state_dict())
    x, _ = tokens(12)
    close(memory(x).output, avgk(x).output)


@pytest.mark.parametrize("aggregate", ["avg", "avg_abs", "max", "min", "l2"])
def test_every_aggregate_of_one_cell_is_its_pre_activation(aggregate):
    sizes = dict(num_cells=24, block_size=1, active_blocks=6)
    memory = build(selector=VanillaM.Config(aggregate), **sizes)
    x, _ = tokens(10)
    pre_NC = x @ memory.keys.t() + memory.key_bias
    wanted_NC = pre_NC.abs() if aggregate in ("avg_abs", "l2") else pre_NC
    close(memory(x).selection.scores.logits, wanted_NC)


@pytest.mark.parametrize(
    ("aggregate", "wanted"),
    [
        ("avg", [1.0, 1.25, 0.5]),
        ("avg_abs", [2.0, 1.25, 4.5]),
        ("max", [3.0, 1.5, 5.0]),
        ("min", [-1.0, 1.0, -4.0]),
        ("l2", [10**0.5, 3.25**0.5, 41**0.5]),
    ],
)
def test_aggregates(aggregate, wanted):
    pre_NBG = torch.tensor([[[-1.0, 3.0], [1.0, 1.5], [-4.0, 5.0]]])
    close(aggregated(pre_NBG, aggregate), torch.tensor([wanted]), tolerance=1e-6)
    of_one = [1.0, 1.0, 4.0] if aggregate in ("avg_abs", "l2") else [-1.0, 1.0, -4.0]
    assert aggregated(pre_NBG[..., :1], aggregate).tolist() == [of_one]


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("aggregate", ["avg", "avg_abs", "max", "min", "l2"])
def test_a_full_rank_lorkm_is_vanilla_m(aggregate, block_size):
    sizes = dict(num_cells=32, block_size=block_size, active_blocks=8 // block_size)
    memory = build(selector=VanillaM.Config(aggregate), gate="sigmoid", **sizes)
    low_rank = build(selector=LoRKM.Config(aggregate, rank=8), gate="sigmoid", **sizes)
    selector = low_rank.selector
    with torch.no_grad():
        selector.down.weight.copy_(torch.linalg.qr(torch.randn(8, 8).double()).Q)
        # K = D U, so D = K U^-1, and U is orthogonal.
        selector.up.weight.copy_(memory.keys @ selector.down.weight.t())
        selector.up.bias.copy_(memory.key_bias)
        low_rank.values.copy_(memory.values)
        low_rank.value_bias.copy_(memory.value_bias)
    x, _ = tokens(12)
    assert_same_memory(memory, low_rank, x)

    # The factors' gradients follow from those of the key table by the chain rule.
    grads = []
    for module, tensors in (
        (memory, (memory.keys, memory.key_bias)),
        (low_rank, (selector.up.weight, selector.up.bias, selector.down.weight)),
    ):
        grads.append(torch.autograd.grad(module(x).output.square().sum(), tensors))
    (keys, key_bias), (up, up_bias, down) = grads
    close(up, keys @ selector.down.weight.t())
    close(up_bias, key_bias)
    close(down, selector.up.weight.t() @ keys)


@pytest.mark.parametrize(("embed_dim", "rank"), [(64, 8), (8, 1), (4, 1)])
def test_lorkm_has_an_eighth_of_the_rank_by_default(embed_dim, rank):
    memory = build("lorkm-g1", embed_dim=embed_dim, selector="lorkm")
    assert memory.keys is memory.key_bias is None
    assert memory.selector.down.weight.shape == (rank, embed_dim)
    assert memory.selector.up.weight.shape == (24, rank)


@pytest.mark.parametrize("init_scale", [1.0, 0.5])
def test_lorkm_starts_with_pre_activations_of_a_full_table(init_scale):
    sizes = dict(embed_dim=64, num_cells=4096, block_size=1, active_blocks=64)
    x = torch.randn(64, 64)
    for bias in (True, False):
        options = dict(init_scale=init_scale, bias=bias, **sizes)
        full = build("vanilla_m-g1", torch.float32, **options)
        low_rank = build("lorkm-g1", torch.float32, **options, selector="lorkm")
        spreads = [m(x).selection.scores.logits.std() for m in (full, low_rank)]
        torch.testing.assert_close(*spreads, rtol=0.2, atol=0)


def test_defaults():
    for selector in (VanillaM, LoRKM):
        assert (selector.default_gate, selector.default_block_size(512)) == ("none", 1)
        assert selector.default_balance_weight == 0.0
    assert list(VanillaM(build("vanilla_m-g1").config).parameters()) == []
