import copy

import pytest
import torch

from fairseq_sffn.memory.selectors.avgk import AvgK
from tests.memory.cases import build, close, tokens
from tests.memory.oracle import assert_matches


def right_scores(memory, x):
    """Compute the mean pre-activation of each block."""
    pre_NC = x.to(memory.keys.dtype) @ memory.keys.t() + memory.key_bias
    return pre_NC.unflatten(1, (-1, memory.config.block_size)).mean(dim=2)


def scores_of(memory, x):
    with torch.no_grad():
        return memory(x.to(memory.keys.dtype)).selection.scores.logits


def test_a_score_is_the_mean_pre_activation():
    memory, (x, _) = build(), tokens(8)
    close(scores_of(memory, x), right_scores(memory, x))


@pytest.mark.parametrize("bias", [True, False])
def test_exclude_bias(bias):
    memory, (x, _) = build(selector=AvgK.Config(exclude_bias=True), bias=bias), tokens(8)
    keys = memory.keys.unflatten(0, (8, 4)).mean(dim=1)
    selection = memory(x).selection
    close(selection.scores.logits, x @ keys.t())
    assert torch.equal(selection.blocks, (x @ keys.t()).topk(4).indices)


def test_the_bias_counts_by_default():
    memory = build()
    with torch.no_grad():
        memory.key_bias[8:12] = 1e3
    assert (memory(tokens(8)[0]).selection.blocks[:, 0] == 2).all()


def test_the_keys_learn_from_gate_and_losses():
    memory = build(gate="softmax")
    out = memory(tokens(8)[0])
    for loss in (out.selection.weights[:, 0].sum(), out.balance_loss, out.z_loss):
        for parameter in (memory.keys, memory.key_bias):
            (grad,) = torch.autograd.grad(loss, parameter, retain_graph=True)
            blocks = grad.reshape(8, 4, -1)
            assert (blocks != 0).any(dim=2).all()
            close(blocks, blocks[:, :1].expand_as(blocks), tolerance=1e-14)  # a mean spreads evenly


# Centred hidden states


def centered(**options):
    return build(selector=AvgK.Config(center=True, **options), gate="softmax")


@pytest.mark.parametrize("padding", [False, True])
def test_hidden_states_are_scored_less_their_running_mean(padding):
    memory = centered()
    sums, number = [0.0] * 8, 0.0
    for _ in range(3):
        x, _ = tokens(20)
        mask = torch.rand(20) < 0.3 if padding else None
        mean = torch.tensor([s / max(number, 1) for s in sums]).double()
        selection = memory(x, padding_mask=mask).selection
        scores = right_scores(memory, x - mean)
        close(selection.scores.logits, scores, tolerance=1e-6)
        assert torch.equal(selection.blocks, scores.topk(4).indices)
        real = [n for n in range(20) if not (padding and mask[n])]
        sums = [0.99 * s + sum(x[n, d].item() for n in real) for d, s in enumerate(sums)]
        number = 0.99 * number + len(real)
    assert not torch.equal(scores.topk(4).indices, right_scores(memory, x).topk(4).indices)


def test_centred_hidden_states_are_for_scores_alone():
    memory = centered().eval()  # the mean does not change in evaluation
    memory.selector.hidden_totals.copy_(torch.tensor([8.0, -4, 2, 1, 0, -1, -2, 6, 4]))
    assert_matches(memory, tokens(20)[0])


def test_the_running_mean_rests_without_training():
    memory, (x, _) = centered(), tokens(20)
    memory(x)
    before = memory.selector.hidden_totals.clone()
    with torch.no_grad():  # the first pass of activation checkpointing
        memory(x)
    memory.eval()
    memory(x)
    assert torch.equal(memory.selector.hidden_totals, before)
    memory.train()(x, padding_mask=torch.ones(20, dtype=torch.bool))
    close(memory.selector.hidden_mean(), before[:8] / before[8])


def test_what_all_tokens_have_in_common_favours_no_block():
    plain, (x, _) = build(), tokens(400)
    shifted = x + 5 * torch.randn(8)
    memory = build(selector=AvgK.Config(center=True))
    memory.load_state_dict(plain.state_dict(), strict=False)
    memory(shifted)
    assert plain(shifted).usage.counts.max() > 1.8 * 200
    assert memory(shifted).usage.counts.max() < 1.4 * 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_running_mean_in_half_precision(dtype):
    memory = build(selector=AvgK.Config(center=True)).to(dtype)
    x = tokens(50)[0].to(dtype) + 3
    for _ in range(200):  # more tokens than half precision can count
        memory(x)
    close(memory.selector.hidden_mean().double(), x.double().mean(dim=0), tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_trained_model_in_half_precision_keeps_the_running_mean(dtype):
    """The model has trained on more tokens than half precision can count."""
    memory = build(selector=AvgK.Config(center=True), dtype=torch.float32)
    memory.selector.hidden_totals.copy_(torch.tensor([3e5] * 8 + [1e5]))
    memory.to(dtype)
    close(memory.selector.hidden_mean(), torch.full((8,), 3.0))
    assert memory.double().selector.hidden_totals.dtype == torch.float64


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("padding", [False, True])
def test_what_overflows_leaves_the_mean_as_it_was(value, padding):
    """fairseq skips the update of such a micro-batch. At padding the values are ignored."""
    memory, other = centered(), centered()
    x, _ = tokens(1, 50)
    memory(x)
    other.load_state_dict(memory.state_dict())
    mask = torch.zeros(1, 50, dtype=torch.bool)
    mask[0, 7] = padding
    bad = x.clone()
    bad[0, 7, 3] = value
    memory(bad, padding_mask=mask)
    if padding:
        other(x, padding_mask=mask)
    close(memory.selector.hidden_totals, other.selector.hidden_totals)


def test_the_running_mean_under_autocast():
    memory = build(selector=AvgK.Config(center=True), dtype=torch.float32)
    x = tokens(400, dtype=torch.float32)[0] + 3
    with torch.autocast("cpu", torch.bfloat16):
        memory(x)
    close(memory.selector.hidden_mean(), x.mean(dim=0), tolerance=1e-5)


def test_centred_and_balanced():
    memory, (x, _) = build(selector=AvgK.Config(center=True), balance_rate=0.3), tokens(20)
    memory(x)
    memory.end_update()
    mean, bias = memory.selector.hidden_mean(), memory.balancer.bias
    scores = right_scores(memory, x - mean)
    assert bias.any()
    assert torch.equal(memory(x).selection.blocks, (scores + bias).topk(4).indices)


def test_a_checkpoint_has_the_running_mean():
    memory = centered()
    memory(tokens(20)[0])
    other = centered()
    other.load_state_dict(memory.state_dict())
    close(other.selector.hidden_mean(), memory.selector.hidden_mean())
    assert not any("hidden_totals" in name for name in build().state_dict())


# The mean keys kept in evaluation


def update_behind_its_back(memory):
    """Change parameters as optimizers do, without a trace in the version counter."""
    memory.keys.data.neg_()
    memory.key_bias.data.add_(torch.randn_like(memory.key_bias))


def other_state(memory):
    return {
        name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in memory.state_dict().items()
    }


CHANGES = {
    "train, eval": lambda m: (update_behind_its_back(m), m.train(), m.eval()),
    "eval": lambda m: (update_behind_its_back(m), m.eval()),
    "train": lambda m: (update_behind_its_back(m), m.train()),
    "selector.eval": lambda m: (update_behind_its_back(m), m.selector.eval()),
    "load": lambda m: m.load_state_dict(other_state(m)),
    "load, assigned": lambda m: m.load_state_dict(other_state(m), assign=True),
    "load, not strict": lambda m: m.load_state_dict(
        {"keys": torch.randn_like(m.keys)}, strict=False
    ),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.float64),
    "to the same": lambda m: (update_behind_its_back(m), m.to(m.keys.device)),
    "apply": lambda m: (update_behind_its_back(m), m.double(), m.float()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_mean_keys_are_formed_again_after(change):
    memory, (x, _) = build(dtype=torch.float32).eval(), tokens(8)
    scores_of(memory, x)  # caches the mean keys
    CHANGES[change](memory)
    scores, wanted = scores_of(memory, x), right_scores(memory, x)
    assert scores.dtype == memory.keys.dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.1}[scores.dtype]
    close(scores, wanted, tolerance=tolerance)


def test_mean_keys_are_formed_again_when_a_model_around_it_loads_or_moves():
    model, (x, _) = torch.nn.Sequential(build(dtype=torch.float32)).eval(), tokens(8)
    for change in (
        lambda: model.load_state_dict(
            {k: 2 * v for k, v in model.state_dict().items() if v.is_floating_point()}, strict=False
        ),
        lambda: (update_behind_its_back(model[0]), model.train(), model.eval()),
        lambda: model.double(),
    ):
        scores_of(model[0], x)
        change()
        close(scores_of(model[0], x), right_scores(model[0], x), tolerance=1e-5)


def test_mean_keys_are_kept_between_passes_in_evaluation():
    memory, (x, _) = build().eval(), tokens(8)
    before = scores_of(memory, x)
    update_behind_its_back(memory)
    assert torch.equal(scores_of(memory, x), before)


@pytest.mark.parametrize("training", [True, False])
def test_mean_keys_are_not_kept_where_gradients_are_on(training):
    memory, (x, _) = build(gate="sigmoid").train(training), tokens(8)
    scores_of(memory, x)
    update_behind_its_back(memory)
    out = memory(x)
    close(out.selection.scores.logits, right_scores(memory, x))
    assert out.selection.scores.logits.requires_grad
    assert_matches(memory, x)


def test_mean_keys_are_not_kept_in_training():
    memory, (x, _) = build(), tokens(8)
    scores_of(memory, x)
    update_behind_its_back(memory)
    close(scores_of(memory, x), right_scores(memory, x))


def test_gradients_never_leave_a_graph_in_what_is_kept():
    memory, (x, _) = build().eval(), tokens(8)
    memory(x)
    assert not scores_of(memory, x).requires_grad
    memory(x).output.sum().backward()
    memory(x).output.sum().backward()


def test_inference_mode_then_training():
    memory, (x, _) = build().eval(), tokens(8)
    with torch.inference_mode():
        memory(x)
    scores_of(memory, x)
    assert_matches(memory, x)
    assert_matches(memory.train(), x)


def test_what_is_kept_is_not_stored_and_copies_are_independent():
    memory, (x, _) = build().eval(), tokens(8)
    names = set(memory.state_dict())
    scores_of(memory, x)
    assert set(memory.state_dict()) == names
    copied = copy.deepcopy(memory)
    copied.load_state_dict(other_state(memory))
    close(scores_of(copied, x), right_scores(copied, x))
    close(scores_of(memory, x), right_scores(memory, x))


def test_defaults():
    assert (AvgK.default_gate, AvgK.default_block_size(512)) == ("none", 64)
    assert AvgK.default_balance_weight == 0.0
    assert list(AvgK(build().config).parameters()) == []


def test_mean_keys_follow_tables_that_are_written_in_place_or_lent():
    memory, other = build().eval(), build().eval()
    x, _ = tokens(8)
    with torch.no_grad():
        memory(x)
        memory.keys.mul_(-2)
        close(memory(x).selection.scores.logits, right_scores(memory, x))
        memory.key_bias.add_(1)
        close(memory(x).selection.scores.logits, right_scores(memory, x))
        lent = torch.func.functional_call(memory, dict(other.named_parameters()), (x,))
        close(lent.selection.scores.logits, right_scores(other, x))
        close(memory(x).selection.scores.logits, right_scores(memory, x))
