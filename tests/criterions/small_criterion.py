"""Builds the criterion and small batches, and reads what is logged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from fairseq.logging import metrics
from torch import nn

from fairseq_sffn.criterions.sffn_cross_entropy import (
    SFFNCrossEntropyConfig,
    SFFNCrossEntropyCriterion,
)
from tests.models.small_lm import PAD, language_modeling, pad, random_tokens, small_lm

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
    """Build a model with two sparse layers in evaluation mode, so that passes agree.

    The method ``mixed`` has three.
    """
    if method != "mixed":
        options["sffn_freq"] = 1
    return small_lm(method, **options).eval()


def routing(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    return model(**batch["net_input"], routing_losses=True)[1]["routing"]


def reduced(logs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the values that would be logged."""
    with metrics.aggregate(new_root=True) as meters:
        SFFNCrossEntropyCriterion.reduce_metrics(logs)
    return dict(meters.get_smoothed_values())


def logs_of(
    model: nn.Module, batches: Iterable[dict[str, Any]], **options: Any
) -> list[dict[str, Any]]:
    return [criterion(**options)(model, batch)[2] for batch in batches]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    ours, theirs = float(actual), float(expected)
    assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance), f"{ours} is not {theirs}"
