"""The loss, and the values that are logged with it."""

from __future__ import annotations

import io
import math
from argparse import Namespace
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.logging.meters import MetersDict
from fairseq.models import lstm_lm
from fairseq.trainer import Trainer
from torch import Tensor, nn

from fairseq_sffn.criterions.sffn_cross_entropy import (
    SFFNCrossEntropyConfig,
    SFFNCrossEntropyCriterion,
)
from fairseq_sffn.errors import UsageError
from fairseq_sffn.memory import SparseMemory, usage
from fairseq_sffn.memory.selectors.avgk import AvgK
from fairseq_sffn.models.layer import LayerRouting
from tests.models.small_lm import (
    PAD,
    build,
    language_modeling,
    pad,
    random_tokens,
    small_config,
    small_lm,
)

SPARSE = ("avgk", "switch", "hash_layer")
TASK = language_modeling()


def criterion(**options: Any) -> SFFNCrossEntropyCriterion:
    plain = dict(
        sentence_avg=False,
        distributed_world_size=1,
        ddp_backend="legacy_ddp",
        log_format="simple",
        tensorboard_logdir="",
    )
    return SFFNCrossEntropyCriterion(SFFNCrossEntropyConfig(**{**plain, **options}), TASK)


def sample(*lengths: int) -> dict[str, Any]:
    """Make sentences of random tokens, padded to the longest."""
    rows = [random_tokens(length + 1) for length in lengths]
    target = pad([row[1:] for row in rows])
    return {
        "id": torch.arange(len(rows)),
        "net_input": {
            "src_tokens": pad([row[:-1] for row in rows]),
            "src_lengths": torch.tensor(lengths),
        },
        "target": target,
        "ntokens": int((target != PAD).sum()),
        "nsentences": len(rows),
    }


def two_layers(method: str, **options: Any) -> nn.Module:
    """Build a model with two sparse layers in evaluation mode, so that passes agree."""
    return small_lm(method, sffn_freq=1, **options).eval()


def routing(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    return model(**batch["net_input"], routing_losses=True)[1]["routing"]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert float(actual) == pytest.approx(float(expected), rel=tolerance, abs=tolerance)


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
    layers = {"layer0": LayerRouting(nothing, nothing, *(torch.zeros(1) for _ in range(4)))}
    assert criterion().extra_loss(AvgK, layers) == 0
    assert math.isnan(criterion(z_loss_weight=1.0).extra_loss(AvgK, layers))


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


# Logging


def reduced(logs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the values that would be logged."""
    with metrics.aggregate(new_root=True) as meters:
        SFFNCrossEntropyCriterion.reduce_metrics(logs)
    return dict(meters.get_smoothed_values())


def logs_of(
    model: nn.Module, batches: Iterable[dict[str, Any]], **options: Any
) -> list[dict[str, Any]]:
    return [criterion(**options)(model, batch)[2] for batch in batches]


def concatenated(batches: list[dict[str, Any]]) -> dict[str, Any]:
    def rows(tokens: Iterable[Tensor]) -> Tensor:
        return pad([row[row != PAD] for batch in tokens for row in batch])

    target = rows(batch["target"] for batch in batches)
    src_tokens = rows(batch["net_input"]["src_tokens"] for batch in batches)
    return {
        "net_input": {"src_tokens": src_tokens, "src_lengths": (src_tokens != PAD).sum(1)},
        "target": target,
        "ntokens": sum(batch["ntokens"] for batch in batches),
    }


def batches() -> list[dict[str, Any]]:
    return [sample(5, 3, 2), sample(1), sample(4, 4)]


RATIOS = [
    "load_entropy",
    "load_max",
    "unused_blocks",
    "memory_usage",
    "load_kl",
    "dropped_share",
]


@pytest.mark.parametrize("method", SPARSE)
def test_ratios_of_several_batches_are_those_of_one(method):
    model, parts = two_layers(method), batches()
    logs = logs_of(model, parts, log_format="json")
    actual = reduced(logs)
    expected = reduced(logs_of(model, [concatenated(parts)], log_format="json"))
    assert actual.keys() == expected.keys()
    for name in RATIOS:
        for key in (name, f"{name}_layer0", f"{name}_layer1"):
            assert actual[key] == expected[key]
    close(actual["loss"], expected["loss"], 1e-3)
    # No part has these values by itself.
    assert actual["load_entropy"] not in [reduced([log])["load_entropy"] for log in logs]


@pytest.mark.parametrize("method", SPARSE)
def test_logged_values(method):
    model, parts = two_layers(method, sffn_eval_capacity_factor=1.0), batches()
    actual = reduced(logs_of(model, parts, log_format="json"))
    layers = [routing(model, batch) for batch in parts]
    sizes = [batch["ntokens"] for batch in parts]
    means = dict.fromkeys([*RATIOS, "balance_loss"], 0.0)
    for number in (0, 1):
        counts = sum(part[f"layer{number}"].counts for part in layers)
        dropped = sum(part[f"layer{number}"].dropped for part in layers)
        losses = [part[f"layer{number}"].balance_loss.item() for part in layers]
        assert counts.sum() == sum(sizes) * model.memory_config.active_blocks and dropped > 0
        expected = {
            "load_entropy": usage.load_entropy(counts),
            "load_max": usage.load_max(counts),
            "unused_blocks": (counts == 0).sum().item(),
            "memory_usage": (counts > 0).double().mean().item(),
            "load_kl": usage.load_kl(sum(part[f"layer{number}"].importance for part in layers)),
            "dropped_share": dropped.item() / counts.sum().item(),
            "balance_loss": sum(map(math.prod, zip(losses, sizes, strict=True))) / sum(sizes),
        }
        if method == "hash_layer":
            del expected["balance_loss"]
        for name, value in expected.items():
            assert actual[f"{name}_layer{number}"] == pytest.approx(value, abs=6e-5), name
            means[name] += value / 2
    for name in expected:
        assert actual[name] == pytest.approx(means[name], abs=6e-5), name
    assert ("balance_loss" in actual) == (method != "hash_layer")


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


@pytest.mark.parametrize(
    ("options", "per_layer"),
    [
        ({}, False),
        (dict(log_format="json"), True),
        (dict(log_format="tqdm"), False),
        (dict(tensorboard_logdir="runs"), True),
        (dict(log_format=None, tensorboard_logdir=None), False),
    ],
)
def test_layers_are_logged_one_by_one_for_programs_only(options, per_layer):
    keys = reduced(logs_of(two_layers("switch"), [sample(5)], **options)).keys()
    expected = {"loss", "ppl", "balance_loss", *RATIOS}
    if per_layer:
        names = [*RATIOS, "balance_loss"]
        expected |= {f"{name}_layer{number}" for name in names for number in (0, 1)}
    assert keys == expected


def test_perplexity_is_fairseqs():
    logs = logs_of(two_layers("switch"), batches(), balance_loss_weight=10.0)
    actual = reduced(logs)
    with metrics.aggregate(new_root=True) as meters:
        CrossEntropyCriterion.reduce_metrics(logs)
    expected = meters.get_smoothed_values()
    assert {key: actual[key] for key in expected} == expected


def test_skipped_layers_are_logged():
    """LayerDrop skips a layer in the first batch but not in the second."""
    model, parts = small_lm("switch", sffn_freq=1, decoder_layerdrop=1.0), batches()[:2]
    skipped = logs_of(model.train(), parts[:1], log_format="json")
    ran = logs_of(model.eval(), parts[1:], log_format="json")
    assert reduced(skipped)["unused_blocks_layer1"] == 0  # nothing is known of the layer
    both, second = reduced(skipped + ran), reduced(ran)
    for name in ("load_max_layer1", "balance_loss_layer1", "balance_loss"):
        assert both[name] == second[name] > 0


def test_meters_add_up_over_a_log_interval():
    logs = logs_of(two_layers("switch", sffn_eval_capacity_factor=1.0), batches())
    with metrics.aggregate(new_root=True) as meters:
        for log in logs:
            SFFNCrossEntropyCriterion.reduce_metrics([log])
    actual, expected = meters.get_smoothed_values(), reduced(logs)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, rel=1e-3), key


@pytest.mark.parametrize("method", SPARSE)
def test_meters_survive_a_checkpoint(method):
    logs = logs_of(two_layers(method), batches(), log_format="json")
    with metrics.aggregate(new_root=True) as whole:
        for log in logs:
            SFFNCrossEntropyCriterion.reduce_metrics([log])
    with metrics.aggregate(new_root=True) as first:
        SFFNCrossEntropyCriterion.reduce_metrics(logs[:1])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = MetersDict()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    with metrics.aggregate(new_root=True):
        metrics._active_aggregators["resumed"] = resumed
        for log in logs[1:]:
            SFFNCrossEntropyCriterion.reduce_metrics([log])
    assert resumed.get_smoothed_values() == whole.get_smoothed_values()


@pytest.mark.parametrize("method", SPARSE)
def test_fairseq_can_sum_what_workers_log(method, monkeypatch):
    """One worker has two micro-batches and the other has one."""
    assert SFFNCrossEntropyCriterion.logging_outputs_can_be_summed()
    model = two_layers(method, sffn_eval_capacity_factor=1.0)
    logs = logs_of(model, batches(), log_format="json")
    for log in logs:
        assert all(torch.is_tensor(value) or type(value) in (int, float) for value in log.values())
    worker = SimpleNamespace(device=torch.device("cpu"), data_parallel_process_group=None)

    def sync(logs: list[dict[str, Any]], reduce: Any, ignore: bool = False) -> dict[str, Any]:
        monkeypatch.setattr(distributed_utils, "all_reduce", reduce)
        (log,), _ = Trainer._fast_stat_sync_sum(worker, logs, 0, ignore=ignore)
        return log

    for other, ignore, counted in ((logs[2:], False, logs), (logs[2:], True, logs[:2])):
        sent: list[Tensor] = []
        sync(other, lambda buffer, group, sent=sent: sent.append(buffer.clone()), ignore)
        log = sync(logs[:2], lambda buffer, group, sent=sent: buffer.add_(sent.pop(0)))
        expected = reduced(counted)
        # A flag that is a sum of flags
        assert reduced([log]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["switch", "rand_hash"])
def test_layers_that_were_skipped_do_not_count(method):
    """A skipped layer routes nothing. The logged values cover the batches and layers that ran."""
    model, (first, second) = two_layers(method), batches()[:2]
    both = logs_of(model, [first, second], log_format="json")
    skipped = [dict(log) for log in both]
    for key in [key for key in skipped[1] if key.endswith("_layer0") and "routing" in key]:
        skipped[1][key] = skipped[1][key] * 0
    alone, actual = reduced(both[:1]), reduced(skipped)
    for name in ("load_max_layer0", "balance_loss_layer0"):
        if name in alone:
            assert actual[name] == pytest.approx(alone[name], abs=1e-4)
    never = [{key: value * 0 if "_layer0" in key else value for key, value in both[0].items()}]
    for name in ("load_max", "load_entropy", "balance_loss"):
        if name in alone:
            assert reduced(never)[name] == pytest.approx(alone[f"{name}_layer1"], abs=1e-4)
