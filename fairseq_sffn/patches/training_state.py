"""Training state that fairseq does not store or does not restore."""

from __future__ import annotations

from typing import Any

import numpy as np
from fairseq import checkpoint_utils
from fairseq.logging import metrics
from fairseq.logging.meters import AverageMeter, SumMeter
from fairseq.optim.dynamic_loss_scaler import DynamicLossScaler
from fairseq.optim.lr_scheduler.reduce_lr_on_plateau import ReduceLROnPlateauLRSchedule
from fairseq.trainer import Trainer
from fairseq_cli import train as train_command

EARLY_STOPPING = "early_stopping"
"""Entry of a checkpoint's extra state for the counts of ``--patience``."""
LOSS_SCALER = "loss_scaler"
"""Entry of a checkpoint's extra state for the state of the loss scaler."""


def forget_other_trainings() -> None:
    """Remove the state that another training in this process has left.

    fairseq keeps the best loss in attributes of two functions.
    """
    for function in (train_command.should_stop_early, checkpoint_utils.save_checkpoint):
        for name in ("best", "num_runs"):
            vars(function).pop(name, None)


def extra_state(trainer: Trainer) -> dict[str, Any]:
    """Return the state that fairseq does not store.

    It has the counts of ``--patience``, and the state of the loss scaler of ``--fp16`` and
    ``--amp``.
    """
    known = vars(train_command.should_stop_early)
    counted = {name: known[name] for name in ("best", "num_runs") if name in known}
    entries = {EARLY_STOPPING: counted, LOSS_SCALER: loss_scaler_state(trainer)}
    return {name: entry for name, entry in entries.items() if entry}


def restore_early_stopping(extra_state: dict[str, Any]) -> None:
    """Restore the counts of ``--patience``."""
    for name, value in extra_state.get(EARLY_STOPPING, {}).items():
        setattr(train_command.should_stop_early, name, value)


def restore_arrays_of_meters(extra_state: dict[str, Any]) -> None:
    """Convert lists in meters to arrays (``--eval-bleu``).

    Checkpoints store arrays as lists, which a meter cannot average.
    """
    for name in extra_state.get("metrics", {}):
        for meter in (metrics.get_meters(name) or {}).values():
            if isinstance(meter, AverageMeter | SumMeter):
                for key, value in vars(meter).items():
                    if isinstance(value, list):
                        setattr(meter, key, np.array(value))


def loss_scaler_state(trainer: Trainer) -> dict[str, Any]:
    """Return the state of a trainer's loss scaler; empty: the trainer has none."""
    scaler = getattr(trainer.optimizer, "scaler", None)
    if isinstance(scaler, DynamicLossScaler):
        changing = (
            "_iter",
            "_last_overflow_iter",
            "_last_rescale_iter",
            "_overflows_since_rescale",
        )
        return {name: getattr(scaler, name) for name in ("loss_scale", *changing)}
    return {} if scaler is None else scaler.state_dict()


def restore_loss_scaler(trainer: Trainer, extra_state: dict[str, Any]) -> None:
    """Restore the state of the loss scaler, if the training has a scaler of the same kind."""
    saved, own = extra_state.get(LOSS_SCALER, {}), loss_scaler_state(trainer)
    if own and saved.keys() == own.keys():
        scaler = trainer.optimizer.scaler
        if isinstance(scaler, DynamicLossScaler):
            vars(scaler).update(saved)
        else:
            scaler.load_state_dict(saved)


def schedule_state(scheduler: Any) -> dict[str, Any]:
    """Return the counts of ``reduce_lr_on_plateau``, which fairseq does not store."""
    if not isinstance(scheduler, ReduceLROnPlateauLRSchedule):
        return {}
    counted = scheduler.lr_scheduler.num_bad_epochs
    return {"num_bad_epochs": counted, "lr": scheduler.optimizer.get_lr()}


def restore_schedule(scheduler: Any, saved: dict[str, Any], restore_lr: bool) -> None:
    """Restore the count of epochs without an improvement (``reduce_lr_on_plateau``).

    Args:
        scheduler: the trainer's learning rate schedule.
        saved: its stored state.
        restore_lr: whether to restore the learning rate as well. The optimizer's state also has it.
    """
    if isinstance(scheduler, ReduceLROnPlateauLRSchedule) and "num_bad_epochs" in saved:
        scheduler.lr_scheduler.num_bad_epochs = saved["num_bad_epochs"]
        if restore_lr:
            scheduler.optimizer.set_lr(saved["lr"])
