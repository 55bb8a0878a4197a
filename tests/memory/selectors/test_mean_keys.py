"""Mean keys with the options of EMoE, as Avg-K uses them."""

import pytest
import torch

from fairseq_sffn.memory import ConfigError
from fairseq_sffn.memory.selectors.avgk import AvgK
from tests.memory.cases import build, close, tokens


def scores_of(memory, x):
    with torch.no_grad():
        return memory(x).selection.scores.logits


def factors(memory):
    """Return the factor of each cell's key and bias."""
    options, factors_C = memory.config.selector_options, torch.ones(len(memory.keys)).double()
    if options.normalize_keys:
        factors_C = factors_C / memory.keys.detach().norm(dim=1)
    if options.value_norm:
        scale = memory.config.value_lr_scale
        factors_C = factors_C * scale * memory.values.detach().norm(dim=1)
    return factors_C


@pytest.mark.parametrize("value_lr_scale", [1.0, 4.0])
@pytest.mark.parametrize("exclude_bias", [False, True])
@pytest.mark.parametrize(("normalize_keys", "value_norm"), [(1, 0), (0, 1), (1, 1)])
def test_keys_and_biases_have_factors(normalize_keys, value_norm, exclude_bias, value_lr_scale):
    options = AvgK.Config(
        exclude_bias=exclude_bias,
        normalize_keys=bool(normalize_keys),
        value_norm=bool(value_norm),
    )
    memory, (x, _) = build(selector=options, value_lr_scale=value_lr_scale), tokens(20)
    bias_C = torch.zeros_like(memory.key_bias) if exclude_bias else memory.key_bias
    pre_NC = factors(memory) * (x @ memory.keys.t() + bias_C)
    scores_NB = pre_NC.unflatten(1, (8, 4)).mean(dim=2)
    selection = memory(x).selection
    close(selection.scores.logits, scores_NB)
    assert torch.equal(selection.blocks, scores_NB.topk(4).indices)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalize_keys", [False, True])
@pytest.mark.parametrize("mean_of", ["up", "up_abs"])
def test_means_of_the_second_key_table(mean_of, normalize_keys, bias):
    options = AvgK.Config(mean_of=mean_of, normalize_keys=normalize_keys)
    memory, (x, _) = build(selector=options, glu="silu", bias=bias), tokens(20)
    with torch.no_grad():
        memory.keys.zero_()  # would make all scores equal
    sign = (lambda table: table.abs()) if mean_of == "up_abs" else (lambda table: table)
    up_CD, bias_C = sign(memory.up), sign(memory.up_bias) if bias else torch.zeros(32).double()
    lengths_C = memory.up.norm(dim=1) if normalize_keys else torch.ones(32).double()
    scores_NB = ((x @ up_CD.t() + bias_C) / lengths_C).unflatten(1, (8, 4)).mean(dim=2)
    out = memory(x)
    close(out.selection.scores.logits, scores_NB)
    assert torch.equal(out.selection.blocks, scores_NB.topk(4).indices)
    tables = (memory.up, memory.up_bias) if bias else (memory.up,)
    cotangent = torch.randn_like(scores_NB)
    for got, wanted in zip(
        torch.autograd.grad(out.selection.scores.logits, tables, cotangent),
        torch.autograd.grad(scores_NB, tables, cotangent),
        strict=True,
    ):
        close(got, wanted)
    # What is kept in evaluation follows the table.
    memory.eval()
    before = scores_of(memory, x)
    with torch.no_grad():
        memory.up.neg_()
    close(scores_of(memory, x) == before, torch.full_like(before, mean_of == "up_abs").bool(), 0)


def test_without_gated_cells_there_is_no_second_key_table():
    with pytest.raises(
        ConfigError, match=r"^mean_of up: needs gated cells \(MemoryConfig\.glu or --sffn-glu\)$"
    ):
        build(selector=AvgK.Config(mean_of="up"))


def test_a_key_of_length_0_counts_as_0():
    memory, (x, _) = build(selector=AvgK.Config(normalize_keys=True)), tokens(5)
    with torch.no_grad():
        memory.keys[:4] = 0
        memory.key_bias[:4] = 0
    out = memory(x)
    assert (out.selection.scores.logits[:, 0] == 0).all()
    (grad,) = torch.autograd.grad(out.balance_loss, memory.keys)
    assert grad.isfinite().all()


@pytest.mark.parametrize("what", ["keys", "values"])
def test_what_is_kept_follows_keys_and_values(what):
    memory, (x, _) = build(selector=AvgK.Config(value_norm=True)).eval(), tokens(8)
    before = scores_of(memory, x)
    with torch.no_grad():
        getattr(memory, what)[:4].mul_(3)
        close(scores_of(memory, x)[:, 1:], before[:, 1:])
        assert not torch.allclose(scores_of(memory, x)[:, 0], before[:, 0])
        pre_NC = factors(memory) * (x @ memory.keys.t() + memory.key_bias)
        close(scores_of(memory, x), pre_NC.unflatten(1, (8, 4)).mean(dim=2))


# The moving average of the mean keys


def averaged(**options):
    return build(selector=AvgK.Config(key_ema=0.8, **options), gate="sigmoid")


def mean_keys(memory):
    """Return the mean key and the mean bias of each block in one table."""
    table = torch.cat([memory.keys, memory.key_bias.unsqueeze(1)], dim=1).detach()
    return (factors(memory).unsqueeze(1) * table).unflatten(0, (8, 4)).mean(dim=1)


@pytest.mark.parametrize("options", [{}, dict(normalize_keys=True, value_norm=True)])
def test_scores_are_those_of_the_average(options):
    memory = averaged(**options)
    average = mean_keys(memory)
    for step in range(3):
        x, _ = tokens(10)
        wanted = x @ average[:, :8].t() + average[:, 8]
        selection = memory(x).selection
        close(selection.scores.logits, wanted, tolerance=1e-6)
        assert torch.equal(selection.blocks, selection.scores.logits.topk(4).indices)
        average = 0.8 * average + 0.2 * mean_keys(memory)
        close(memory.selector.key_average.double(), average, tolerance=1e-6)
        assert memory.selector.key_updates == step + 1
        with torch.no_grad():
            memory.keys.add_(torch.randn_like(memory.keys))
            memory.key_bias.add_(torch.randn_like(memory.key_bias))
    assert not torch.allclose(average, mean_keys(memory), atol=0.1)


def test_without_biases_they_have_no_average():
    for changes in (dict(bias=False), dict(selector=AvgK.Config(key_ema=0.8, exclude_bias=True))):
        memory = build(**{"selector": AvgK.Config(key_ema=0.8), **changes})
        assert memory.selector.key_average.shape == (8, 8)
        memory(tokens(5)[0])
        close(
            memory.selector.key_average.double(),
            memory.keys.unflatten(0, (8, 4)).mean(dim=1),
            tolerance=1e-6,
        )


def test_the_average_rests_without_training():
    memory, (x, _) = averaged(), tokens(10)
    memory(x)
    before = {name: buffer.clone() for name, buffer in memory.selector.named_buffers()}
    with torch.no_grad():
        memory.keys.mul_(2)
        first = memory(x).selection  # the first pass of activation checkpointing
    memory.eval()
    memory(x)
    for name, buffer in memory.selector.named_buffers():
        assert torch.equal(buffer, before[name])
    assert torch.equal(memory.train()(x).selection.blocks, first.blocks)  # the second pass
    assert memory.selector.key_updates == 2


def test_the_average_is_a_constant():
    memory, (x, _) = averaged(), tokens(10)
    memory(x)
    out = memory(x.requires_grad_())
    grads = torch.autograd.grad(out.balance_loss, (x, memory.keys), allow_unused=True)
    assert grads[0].any() and grads[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_average_in_half_precision(dtype):
    memory = build(selector=AvgK.Config(key_ema=0.9999)).to(dtype)
    x = tokens(5)[0].to(dtype)
    memory(x)
    with torch.no_grad():
        memory.keys.add_(1)
    before = memory.selector.key_average.clone()
    memory(x)
    assert before.dtype == torch.float32
    close(memory.selector.key_average[:, :8], before[:, :8] + 1e-4, tolerance=2e-5)


def test_a_checkpoint_has_the_average():
    memory, other, (x, _) = averaged(), averaged(), tokens(10)
    memory(x)
    with torch.no_grad():
        memory.keys.mul_(-1)
    memory(x)
    other.load_state_dict(memory.state_dict())
    for module in (memory, other):
        close(module.eval()(x).output, memory(x).output, tolerance=0)
    assert not any("key_" in name.removeprefix("key_bias") for name in build().state_dict())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("inf"), float("nan")])
def test_decays_that_are_none(decay):
    with pytest.raises(ConfigError, match="key_ema"):
        build(selector=AvgK.Config(key_ema=decay))
