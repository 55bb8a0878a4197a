"""The values that are logged with the loss."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.logging.meters import MetersDict
from fairseq.trainer import Trainer
from torch import Tensor

from fairseq_sffn.criterions.sffn_cross_entropy import SFFNCrossEntropyCriterion
from fairseq_sffn.memory import usage
from tests.criterions.small_criterion import close, logs_of, reduced, routing, sample, two_layers
from tests.models.small_lm import PAD, pad, small_lm

SPARSE = ("avgk", "switch", "hash_layer", "mixed")


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
    "load_min",
    "unused_blocks",
    "memory_usage",
    "load_kl",
    "dropped_share",
]
OF_SCORES = ["balance_loss", "routed_mass", "gate_entropy"]


@pytest.mark.parametrize("method", SPARSE)
def test_ratios_of_several_batches_are_those_of_one(method):
    model, parts = two_layers(method), batches()
    logs = logs_of(model, parts, log_format="json")
    actual = reduced(logs)
    expected = reduced(logs_of(model, [concatenated(parts)], log_format="json"))
    assert actual.keys() == expected.keys()
    for name in RATIOS:
        for key in (name, *(f"{name}_{layer}" for layer in model.memory_configs)):
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
    values: dict[str, list[float]] = {}
    for layer, memory in model.memory_configs.items():
        counts = sum(part[layer].counts for part in layers)
        dropped = sum(part[layer].dropped for part in layers)
        losses = [part[layer].balance_loss.item() for part in layers]
        assert counts.sum() == sum(sizes) * memory.active_blocks and dropped > 0
        expected = {
            "load_entropy": usage.load_entropy(counts),
            "load_max": usage.load_max(counts),
            "load_min": usage.load_min(counts),
            "unused_blocks": (counts == 0).sum().item(),
            "memory_usage": (counts > 0).double().mean().item(),
            "load_kl": usage.load_kl(sum(part[layer].importance for part in layers)),
            "dropped_share": dropped.item() / counts.sum().item(),
            "balance_loss": sum(map(math.prod, zip(losses, sizes, strict=True))) / sum(sizes),
        }
        if memory.selector_class.name == "hash_layer":
            del expected["balance_loss"]
            assert f"balance_loss_{layer}" not in actual
        else:
            of_layer = [part[layer] for part in layers]
            assert sum(part.scored for part in of_layer) == sum(sizes)
            for name, field in (("routed_mass", "routed_mass"), ("gate_entropy", "entropy")):
                total = sum(float(getattr(part, field)) for part in of_layer)
                expected[name] = total / sum(sizes)
        for name, value in expected.items():
            assert actual[f"{name}_{layer}"] == pytest.approx(value, abs=6e-5), name
            values.setdefault(name, []).append(value)
    for name, found in values.items():
        mean = sum(found) / len(found)
        assert actual[name] == pytest.approx(mean, abs=6e-5), name
    for name in OF_SCORES:
        assert (name in actual) == (method != "hash_layer")


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
    names = [*RATIOS, *OF_SCORES]
    expected = {"loss", "ppl", *names}
    if per_layer:
        expected |= {f"{name}_layer{number}" for name in names for number in (0, 1)}
    assert keys == expected


def test_the_range_of_the_biases_is_logged():
    model = two_layers("avgk", sffn_balance_rate=0.1)
    ranges = [0.25, 0.75]
    for layer, highest in zip(model.decoder.layers, ranges, strict=True):
        layer.fc1.memory.balancer.bias[1] = highest
    actual = reduced(logs_of(model, batches(), log_format="json"))
    assert [actual[f"bias_range_layer{number}"] for number in (0, 1)] == ranges
    assert actual["bias_range"] == 0.5
    assert "bias_range" not in reduced(logs_of(two_layers("avgk"), batches()))


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
