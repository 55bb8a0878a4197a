"""Checks the metric that chooses the best checkpoint before training."""

from __future__ import annotations

import functools
from typing import Any

from fairseq.logging import metrics
from fairseq_cli import train as train_command

from .compat import replace_once
from .errors import UsageError


def apply() -> None:
    """Apply every repair."""
    check_metric_first()


def check_metric_first() -> None:
    """fairseq looks for ``--best-checkpoint-metric`` after the first validation, and ends in a
    traceback if there is none of the name. Can go when it looks before it trains."""

    @functools.wraps(train_command.train)
    def train(cfg: Any, trainer: Any, task: Any, epoch_itr: Any) -> Any:
        if not getattr(trainer, "sffn_metric_checked", False):
            check_metric(cfg, trainer, task, epoch_itr.epoch)
            trainer.sffn_metric_checked = True
        return original(cfg, trainer, task, epoch_itr)

    original = train_command.train
    replace_once(train_command, "train", train)


def check_metric(cfg: Any, trainer: Any, task: Any, epoch: int) -> None:
    """Refuse a metric that validation does not give. All processes call it together.

    Metrics are known by one validation step, which is left out for ``loss``: every criterion gives
    it. Training goes on as without it: each update sets its own seed.
    """
    metric = cfg.checkpoint.best_checkpoint_metric
    # A task's hook after validation may add metrics.
    known = metric == "loss" or hasattr(task, "post_validate")
    if known or cfg.dataset.disable_validation:
        return
    dummy = trainer._dummy_batch
    trainer.begin_valid_epoch(epoch)
    subset = cfg.dataset.valid_subset.split(",")[0]
    batches = trainer.get_valid_iterator(subset).next_epoch_itr(
        shuffle=False, set_dataset_epoch=False
    )
    with metrics.aggregate(new_root=True) as validation:
        if batches.has_next():
            trainer.valid_step(next(batches))
    trainer.reset_dummy_batch(dummy)
    names = {*validation.get_smoothed_values(), "num_updates"}
    if len(names) > 1 and metric not in names:
        raise UsageError(
            f"--best-checkpoint-metric {metric}: is none of those that validation gives: "
            f"{', '.join(sorted(names))}"
        )
