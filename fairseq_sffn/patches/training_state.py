"""State of a training that fairseq does not store, or does not restore when it resumes."""

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
"""Entry of a checkpoint's extra state for what ``--patience`` counts."""
LOSS_SCALER = "loss_scaler"
"""Entry of a checkpoint's extra state for the loss scale and what it is changed by."""


def forget_other_trainings() -> None:
    """Remove what another training in this process has left. fairseq keeps the best loss in
    attributes of two functions."""
    for function in (train_command.should_stop_early, checkpoint_utils.save_checkpoint):
        for name in ("best", "num_runs"):
            vars(function).pop(name, None)


def extra_state(trainer: Trainer) -> dict[str, Any]:
    """Return what fairseq does not store: the counts of ``--patience``, and the loss scale of
    ``--fp16`` and ``--amp`` with what it is changed by."""
    known = vars(train_command.should_stop_early)
    counted = {name: known[name] for name in ("best", "num_runs") if name in known}
    entries = {EARLY_STOPPING: counted, LOSS_SCALER: loss_scaler_state(trainer)}
    return {name: entry for name, entry in entries.items() if entry}


def restore_early_stopping(extra_state: dict[str, Any]) -> None:
    """Go on with the counts of ``--patience``."""
    for name, value in extra_state.get(EARLY_STOPPING, {}).items():
        setattr(train_command.should_stop_early, name, value)


def restore_arrays_of_meters(extra_state: dict[str, Any]) -> None:
    """Give meters that summed arrays (``--eval-bleu``) arrays again. A checkpoint has lists, which
    a meter cannot average."""
    for name in extra_state.get("metrics", {}):
        for meter in (metrics.get_meters(name) or {}).values():
            if isinstance(meter, AverageMeter | SumMeter):
                for key, value in vars(meter).items():
                    if isinstance(value, list):
                        setattr(meter, key, np.array(value))


def loss_scaler_state(trainer: Trainer) -> dict[str, Any]:
    """Return the numbers of a trainer's loss scaler, or nothing where there is none."""
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
    """Go on with a stored loss scale, where the training has a scaler of the same kind."""
    saved, own = extra_state.get(LOSS_SCALER, {}), loss_scaler_state(trainer)
    if own and saved.keys() == own.keys():
        scaler = trainer.optimizer.scaler
        if isinstance(scaler, DynamicLossScaler):
            vars(scaler).update(saved)
        else:
            scaler.load_state_dict(saved)


def schedule_state(scheduler: Any) -> dict[str, Any]:
    """Return what ``reduce_lr_on_plateau`` counts and does not store."""
    if not isinstance(scheduler, ReduceLROnPlateauLRSchedule):
        return {}
    counted = scheduler.lr_scheduler.num_bad_epochs
    return {"num_bad_epochs": counted, "lr": scheduler.optimizer.get_lr()}


def restore_schedule(scheduler: Any, saved: dict[str, Any], restore_lr: bool) -> None:
    """Go on with the count of epochs without an improvement.

    Args:
        scheduler: the trainer's schedule of the learning rate.
        saved: its stored state.
        restore_lr: whether to restore the learning rate too, which is in the optimizer's state as
            well.
    """
    if isinstance(scheduler, ReduceLROnPlateauLRSchedule) and "num_bad_epochs" in saved:
        scheduler.lr_scheduler.num_bad_epochs = saved["num_bad_epochs"]
        if restore_lr:
            scheduler.optimizer.set_lr(saved["lr"])
