"""Patches of fairseq's functions that train for an epoch, and validate and save after an update."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from fairseq.logging import metrics
from fairseq_cli import train as train_command

from ..errors import UsageError
from .interruptions import interruptible
from .registry import MENDS_FAIRSEQ, patch
from .trainer import SFFNTrainer

logger = logging.getLogger(__name__)


@patch(
    "fairseq_cli.train:train",
    why="At SIGINT, SIGTERM and SIGUSR1, fairseq ends at once and loses all updates since the last "
    "checkpoint. It continues a finished training. It detects an unknown --best-checkpoint-metric "
    "only after the first validation.",
    until="fairseq saves at signals, and checks before it trains.",
    kind=MENDS_FAIRSEQ,
    written_for=("73232586",),
)
def train(original: Callable[..., Any]) -> Callable[..., Any]:
    """Save and end at a signal, end a finished training, and check the metric before training."""

    @functools.wraps(original)
    def wrapper(cfg: Any, trainer: Any, task: Any, epoch_itr: Any) -> Any:
        def train_epoch() -> Any:
            if reason := reason_to_stop(cfg, trainer):
                logger.info(f"nothing to train: {reason}")
                return [None], True
            try:
                return original(cfg, trainer, task, epoch_itr)
            finally:
                if trainer.writer is not None:
                    trainer.writer.wait()

        if not isinstance(trainer, SFFNTrainer):  # made before the plugin was imported
            return original(cfg, trainer, task, epoch_itr)
        if not trainer.metric_checked:
            check_metric(cfg, trainer, task, epoch_itr.epoch)
            trainer.metric_checked = True
        if cfg.common.tpu:
            return train_epoch()
        with interruptible(cfg, trainer, epoch_itr) as interruption:
            result = train_epoch()
            if interruption.agree() and not interruption.saved:
                interruption.save()
            if interruption.number:
                interruption.leave()
            interruption.goes_on = not result[1] and another_epoch_follows(cfg, epoch_itr)
        return result

    return wrapper


@patch(
    "fairseq_cli.train:validate_and_save",
    why="fairseq does not save if a signal asks it to stop.",
    until="fairseq saves at signals.",
    kind=MENDS_FAIRSEQ,
    written_for=("bb070d38",),
)
def validate_and_save(original: Callable[..., Any]) -> Callable[..., Any]:
    """Save before and after a validation if a signal has come, and end."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> tuple[list[float | None], bool]:
        call = signature.bind(*args, **kwargs).arguments
        trainer = call["trainer"]
        if not isinstance(trainer, SFFNTrainer) or (interruption := trainer.interruption) is None:
            return original(*args, **kwargs)
        interruption.saved, interruption.val_loss = False, None
        if interruption.agree():
            interruption.save()
        losses, should_stop = original(*args, **kwargs)
        interruption.val_loss = losses[0]
        validated = losses != [None]
        if interruption.number:
            unsaved = validated  # the validation changed the state
        else:  # a signal may have come during validation or saving
            unsaved = (validated or interruption.saved) and interruption.agree()
        if unsaved and not interruption.saved:
            interruption.save()
        # Otherwise ``train`` logs the epoch and returns first.
        if interruption.number and not (should_stop or call["end_of_epoch"]):
            interruption.leave()
        return losses, should_stop

    return wrapper


def another_epoch_follows(cfg: Any, epoch_itr: Any) -> bool:
    """Return whether another epoch is known to follow one that did not stop the training.

    With ``--stop-min-lr``, the scheduler's next step decides.
    """
    options = cfg.optimization
    last = 0 < options.max_epoch < epoch_itr.next_epoch_idx
    return options.stop_min_lr < 0 and not last


def reason_to_stop(cfg: Any, trainer: SFFNTrainer) -> str | None:
    """Return in words why a resumed training is already finished; ``None``: it is not.

    fairseq itself checks the number of epochs and ``--stop-min-lr`` in time.
    """
    updates, max_update = trainer.get_num_updates(), cfg.optimization.max_update
    if max_update and updates >= max_update:
        return f"at update {updates} of --max-update {max_update}"
    # Without the time since the start, which differs between ranks.
    hours, most = trainer._previous_training_time / 3600, cfg.optimization.stop_time_hours
    if 0 < most < hours:
        return f"after {hours:.2f} hours of --stop-time-hours {most:g}"
    patience = cfg.checkpoint.patience
    bad_runs = getattr(train_command.should_stop_early, "num_runs", 0)
    if 0 < patience <= bad_runs:
        return f"after {bad_runs} validations without an improvement, of --patience {patience}"
    return None


def check_metric(cfg: Any, trainer: SFFNTrainer, task: Any, epoch: int) -> None:
    """Check that validation gives ``--best-checkpoint-metric``. All processes call it together.

    One validation step shows the metrics. ``loss`` needs no step, because every criterion gives it.
    The step does not change training, because each update sets its own seed.

    Raises:
        UsageError: validation does not give the metric.
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
