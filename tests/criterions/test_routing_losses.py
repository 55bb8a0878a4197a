"""The losses and statistics of an update do not make the host wait for an accelerator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairseq.criterions import FairseqCriterion
from fairseq.logging import metrics

from fairseq_sffn.criterions.routing_losses import RoutingLosses
from fairseq_sffn.memory import Selector
from fairseq_sffn.memory.selectors import hash_layer, hash_moe, rand_hash
from fairseq_sffn.models.plugin_model import PluginModel
from fairseq_sffn.models.stack import SparseStack
from tests.criterions.small_criterion import criterion, logs_of, reduced, sample
from tests.models.small_lm import PAD, SPARSE, random_tokens, small_lm
from tests.synchronisations import Synchronisations, operations

LEFT_OUT = ("memory/compute/", "memory/assignment.py", "fairseq/")
"""Code that may wait: the engines, the host's own copy of the scores, and fairseq."""


class Plain(FairseqCriterion):
    """A criterion that logs nothing."""

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        pass


class OnlyRouting(RoutingLosses, Plain):
    """A criterion that logs the routing alone."""


@pytest.fixture(autouse=True)
def token_ids_are_checked_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hash_layer, hash_moe, rand_hash):
        monkeypatch.setattr(module, "check_token_ids", lambda token_ids, vocab_size: None)
    monkeypatch.setattr(SparseStack, "_check_tokens", lambda self, tokens: None)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("method", [*SPARSE, "mixed"])
def test_a_model_and_its_loss(method, checkpoint_activations):
    options = dict(checkpoint_activations=checkpoint_activations, sffn_engine="embedding_bag")
    options |= {} if method == "mixed" else dict(sffn_freq=1)
    model, batch = small_lm(method, **options), sample(5, 3)
    selector = Selector.registry.get(method)  # None: a method of several, which have scores
    losses = {} if selector and not selector.scores_blocks else dict(z_loss_weight=0.1)
    if losses and (selector is None or selector.selects_by_scores):
        losses["balance_loss_weight"] = 0.1
    with Synchronisations(*LEFT_OUT) as places:
        loss, _, _ = criterion(**losses)(model, batch)
        loss.backward()
    layers, passes = 2, 1 + checkpoint_activations
    copies = layers * passes * (method == "base")
    assert operations(places) == ["cpu"] * copies, places


def test_decoding_a_token():
    model = small_lm("avgk", sffn_engine="embedding_bag").eval()
    tokens = random_tokens(2, 4)
    with torch.no_grad(), Synchronisations(*LEFT_OUT) as places:
        for length in (1, 2, 3):
            model(tokens[:, :length], incremental_state={}, routing_losses=True)
    assert PAD not in tokens and not places


def logs(log_format: str = "json") -> list[dict[str, Any]]:
    """Return the logs of three updates of a layer that seems to send to other processes."""
    model = small_lm("switch", sffn_freq=1, sffn_capacity_factor=1.0)
    made = logs_of(model, [sample(5, 3), sample(1), sample(4, 4)], log_format=log_format)
    for i, log in enumerate(made):
        for layer in ("layer0", "layer1"):
            log[f"routing_sent_{layer}"] = torch.tensor(2**25 + 1 + i)
    return made


@pytest.mark.parametrize("loop", ["train_inner", "valid"])
def test_updates_read_no_value(loop):
    updates = logs()
    metrics.reset()  # earlier trainings of this process left some
    with metrics.aggregate(new_root=True) as root, metrics.aggregate(loop):
        for log in updates:
            with metrics.aggregate() as step, Synchronisations() as places:  # as in the trainer
                OnlyRouting.reduce_metrics([log])
                assert not step.get_smoothed_values()
            assert not places
    with Synchronisations() as places:
        values = root.get_smoothed_values()
    assert places  # the log interval waits
    expected = reduced(updates)
    expected = {name: expected[name] for name in expected if name not in ("loss", "ppl")}
    assert values.keys() == expected.keys()
    sent = expected.pop("sent_bytes")
    assert sent == 3 * values["sent_bytes"] == 6 * (2**25 + 2)
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-3), name


def test_a_step_outside_of_fairseqs_loops_gives_its_ratios():
    """A script may call the trainer itself."""
    update = logs()[0]
    with metrics.aggregate(new_root=True), metrics.aggregate("train"):
        with metrics.aggregate() as step:
            OnlyRouting.reduce_metrics([update])
        values = step.get_smoothed_values()
    assert {"load_entropy", "balance_loss_layer1", "sent_bytes"} <= values.keys()


@pytest.mark.parametrize("shards", [1, 2])
def test_bytes_sent_are_logged_where_blocks_are_sharded(shards, monkeypatch):
    monkeypatch.setattr(PluginModel, "expert_parallel", shards)
    log = criterion()(small_lm("switch"), sample(5))[2]
    assert ("routing_sent_layer1" in log) == ("sent_bytes" in reduced([log])) == (shards > 1)
