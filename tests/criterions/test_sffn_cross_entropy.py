"""The loss: cross entropy, plain or with an adaptive softmax, and the losses of routing."""

from __future__ import annotations

import math
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.models import lstm_lm

from fairseq_sffn.errors import UsageError
from fairseq_sffn.memory import MemoryConfig, SparseMemory
from fairseq_sffn.memory.selectors.avgk import AvgK
from fairseq_sffn.models.layer import LayerRouting
from tests.criterions.small_criterion import (
    TASK,
    close,
    criterion,
    reduced,
    routing,
    sample,
    two_layers,
)
from tests.models.small_lm import PAD, build, small_config, small_lm

# The loss


def test_the_adaptive_loss_of_many_tokens_in_half_precision():
    """The loss is a sum, which would overflow."""
    logits = torch.randn(20_000, 30, dtype=torch.float16, requires_grad=True)
    target = torch.randint(2, 30, (20_000,))
    model = SimpleNamespace(
        decoder=SimpleNamespace(adaptive_softmax=lambda output, target: ([output], [target])),
        get_targets=lambda sample, output: target,
    )
    loss, _ = criterion().compute_loss(model, (logits, None), {})
    close(loss, F.cross_entropy(logits.double(), target, reduction="sum"), tolerance=1e-5)
    loss.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("sentence_avg", [False, True])
@pytest.mark.parametrize(
    ("method", "options", "balance_weight", "z_weight"),
    [
        ("switch", {}, 0.01, 0),
        ("avgk", {}, 0, 0),
        ("hash_layer", {}, 0, 0),
        ("switch", dict(balance_loss_weight=0.0), 0, 0),
        ("switch", dict(balance_loss_weight=0.5), 0.5, 0),
        ("avgk", dict(balance_loss_weight=0.5), 0.5, 0),
        ("switch", dict(balance_loss_weight=0.5, balance_loss_reduce="mean"), 0.25, 0),
        ("switch", dict(z_loss_weight=0.1), 0.01, 0.1),
        ("avgk", dict(z_loss_weight=0.1, balance_loss_reduce="mean"), 0, 0.05),
    ],
)
def test_loss(method, options, balance_weight, z_weight, sentence_avg):
    """``balance_weight`` and ``z_weight`` weigh the sums over the two sparse layers."""
    model, batch = two_layers(method), sample(5, 3, 1)
    base = CrossEntropyCriterion(TASK, sentence_avg)
    plain, plain_size, plain_log = base(model, batch)
    loss, size, log = criterion(sentence_avg=sentence_avg, **options)(model, batch)
    assert size == plain_size == (3 if sentence_avg else 9)
    layers = routing(model, batch).values()
    balance = sum(layer.balance_loss for layer in layers)
    z = sum(layer.z_loss for layer in layers)
    assert (balance > 1.5) == (z > 1.5) == (method != "hash_layer")
    close(loss, plain + size * (balance_weight * balance + z_weight * z))
    # The log has the loss of the language model alone.
    assert {key: log[key] for key in plain_log} == plain_log


@pytest.mark.parametrize(
    ("options", "balance_weights", "z_weights"),
    [
        ({}, (0, 0.2, 0.01), (0, 0, 0)),
        (dict(balance_loss_weight=0.5), (0, 0.5, 0.5), (0, 0, 0)),
        (dict(balance_loss_weight=0.0), (0, 0, 0), (0, 0, 0)),
        (dict(balance_loss_reduce="mean"), (0, 0.1, 0.005), (0, 0, 0)),
        (dict(z_loss_weight=0.3), (0, 0.2, 0.01), (0, 0.3, 0.3)),
        (
            dict(balance_loss_weight=0.0, z_loss_weight=0.3, balance_loss_reduce="mean"),
            *((0, 0, 0), (0, 0.15, 0.15)),
        ),
    ],
)
def test_losses_of_layers_with_different_selectors(
    options, balance_weights, z_weights, monkeypatch
):
    """A hash layer has no scores. By default, each layer has the weight of its selector."""
    monkeypatch.setattr(AvgK, "default_balance_weight", 0.2)
    model, batch = two_layers("mixed"), sample(5, 3, 1)
    plain, size, _ = CrossEntropyCriterion(TASK, False)(model, batch)
    loss, _, _ = criterion(**options)(model, batch)
    layers = routing(model, batch).values()
    assert [bool(layer.balance_loss) for layer in layers] == [False, True, True]
    expected = sum(w * layer.balance_loss for w, layer in zip(balance_weights, layers, strict=True))
    expected += sum(w * layer.z_loss for w, layer in zip(z_weights, layers, strict=True))
    close(loss, plain + size * expected)
    # A default weight of 0 leaves a layer out of the mean.
    monkeypatch.setattr(AvgK, "default_balance_weight", 0.0)
    weights = criterion(**options).weights(model.memory_configs)["balance_loss"]
    found = [weights.get(f"layer{number}", 0) for number in range(3)]
    given = options.get("balance_loss_weight")
    assert found == [0, given or 0, 0.01 if given is None else given]


def test_gradients_of_the_balance_loss_reach_the_router():
    model, batch = two_layers("switch"), sample(5, 3)
    router = model.decoder.layers[0].fc1.memory.selector.router
    grads = []
    for weight in (0.0, 1.0):
        loss, size, _ = criterion(balance_loss_weight=weight)(model, batch)
        grads.append(torch.autograd.grad(loss, router)[0])
    balance = sum(layer.balance_loss for layer in routing(model, batch).values())
    (expected,) = torch.autograd.grad(balance * size, router)
    assert expected.any()
    torch.testing.assert_close(grads[1] - grads[0], expected, rtol=0, atol=1e-10)


def test_a_weight_of_0_leaves_the_losses_out():
    nothing = torch.tensor(math.nan)
    empty = LayerRouting.empty(1, like=nothing)
    layers = {"layer0": empty._replace(balance_loss=nothing, z_loss=nothing)}
    configs = {"layer0": MemoryConfig(8, 32, 8, 1, selector="avgk")}
    assert criterion().extra_loss(configs, layers) == 0
    assert math.isnan(criterion(z_loss_weight=1.0).extra_loss(configs, layers))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, dict(balance_loss_weight=0.1), dict(z_loss_weight=0.1)])
@pytest.mark.parametrize("method", ["avgk", "vanilla_m", "switch"])
def test_losses_are_formed_where_something_reads_them(method, options, training):
    model = build(small_config(method, sffn_freq=1)).double().train(training)
    wanted = not training or bool(options) or method == "switch"
    seen = []
    memory = next(module for module in model.modules() if isinstance(module, SparseMemory))
    handle = memory.register_forward_hook(lambda module, args, out: seen.append(out.balance_loss))
    loss, _, log = criterion(**options)(model, sample(5))
    handle.remove()
    assert [balance is not None for balance in seen] == [wanted]
    assert ("balance_loss" in reduced([log])) == wanted
    loss.backward()
    # Without a reader they are not formed. A caller of the model itself gets them.
    plain = model(**sample(5)["net_input"])[1]["routing"]
    assert not any(layer.balance_loss > 0 for layer in plain.values())
    assert all(layer.balance_loss > 0 for layer in routing(model, sample(5)).values())


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
@pytest.mark.parametrize("name", ["balance_loss_weight", "z_loss_weight"])
def test_weights_out_of_range_are_refused(name, value):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UsageError, match=f"^{flag} {value}: [^\n]+$"):
        criterion(**{name: value})


@pytest.mark.parametrize("name", ["balance_loss_weight", "z_loss_weight"])
def test_weights_are_refused_where_no_block_is_scored(name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UsageError, match=f"^{flag} 0.1: hash_layer [^\n]+$"):
        criterion(**{name: 0.1})(two_layers("hash_layer"), sample(5, 3, 1))


def test_a_dense_model_has_plain_cross_entropy():
    model, batch = small_lm("dense").eval(), sample(5, 3)
    loss, size, log = criterion(balance_loss_weight=1.0, log_format="json")(model, batch)
    plain, plain_size, plain_log = CrossEntropyCriterion(TASK, False)(model, batch)
    assert (loss, size, log) == (plain, plain_size, plain_log)
    assert reduced([log]).keys() == {"loss", "ppl"}


def test_a_model_without_extra_outputs_has_plain_cross_entropy():
    args = Namespace(tokens_per_sample=16, decoder_embed_dim=8, criterion="sffn_cross_entropy")
    lstm_lm.base_architecture(args)
    model, batch = lstm_lm.LSTMLanguageModel.build_model(args, TASK).eval(), sample(5, 3)
    close(criterion()(model, batch)[0], CrossEntropyCriterion(TASK, False)(model, batch)[0])


# Adaptive softmax

ADAPTIVE = dict(share_decoder_input_output_embed=False, adaptive_softmax_cutoff="8,14")


def adaptive_sample() -> dict[str, Any]:
    """Make targets in every cluster."""
    batch = sample(5, 3)
    batch["target"][batch["target"] != PAD] = torch.tensor([4, 7, 8, 10, 13, 14, 16, 19])
    return batch


@pytest.mark.parametrize("sentence_avg", [False, True])
@pytest.mark.parametrize("method", ["dense", "avgk"])
def test_adaptive_softmax_is_fairseqs_adaptive_loss(method, sentence_avg):
    model, batch = small_lm(method, **ADAPTIVE).eval(), adaptive_sample()
    expected, expected_size, expected_log = AdaptiveLoss(TASK, sentence_avg)(model, batch)
    loss, size, log = criterion(sentence_avg=sentence_avg)(model, batch)
    close(loss, expected)
    assert size == expected_size
    close(log.pop("loss"), expected_log.pop("loss"))
    assert {key: log[key] for key in expected_log} == expected_log
    # The value that fairseq-eval-lm finds.
    close(loss, CrossEntropyCriterion(TASK, sentence_avg)(model, batch)[0])


@pytest.mark.parametrize("token", [9, 15])
def test_adaptive_softmax_counts_every_token(token):
    """fairseq takes these tokens for padding: id 1 counted from the start of their clusters."""
    model, batch = small_lm("avgk", **ADAPTIVE).eval(), sample(3)
    batch["target"].fill_(token)
    loss, *_ = criterion()(model, batch)
    close(loss, CrossEntropyCriterion(TASK, False)(model, batch)[0])


def test_adaptive_softmax_adds_the_balance_loss():
    model, batch = small_lm("switch", **ADAPTIVE).eval(), adaptive_sample()
    expected, size, _ = AdaptiveLoss(TASK, False)(model, batch)
    balance = routing(model, batch)["layer1"].balance_loss
    close(criterion(balance_loss_weight=0.5)(model, batch)[0], expected + 0.5 * size * balance)


def test_adaptive_softmax_copes_with_clusters_that_no_token_is_in():
    model, batch = small_lm("avgk", **ADAPTIVE).eval(), adaptive_sample()
    batch["target"].clamp_(max=7)
    close(criterion()(model, batch)[0], AdaptiveLoss(TASK, False)(model, batch)[0])


@pytest.mark.parametrize(
    ("world_size", "backend", "refused"),
    [(2, "pytorch_ddp", True), (2, "c10d", True), (2, "legacy_ddp", False), (1, "c10d", False)],
)
def test_adaptive_softmax_is_refused_where_unused_clusters_would_hang(world_size, backend, refused):
    model, batch = small_lm("avgk", **ADAPTIVE).eval(), sample(5)
    ours = criterion(distributed_world_size=world_size, ddp_backend=backend)
    if not refused:
        ours(model, batch)
        return
    with pytest.raises(UsageError, match=f"^--ddp-backend {backend}: [^\n]+legacy_ddp$"):
        ours(model, batch)
