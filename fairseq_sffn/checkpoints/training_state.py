"""State of a training that fairseq does not store, or does not restore when it resumes."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from fairseq.optim.dynamic_loss_scaler import DynamicLossScaler
from fairseq.optim.lr_scheduler.reduce_lr_on_plateau import ReduceLROnPlateauLRSchedule
from fairseq.trainer import Trainer

from ..compat import replace_once

LOSS_SCALER = "loss_scaler"
"""Entry of a checkpoint's extra state for the loss scale and what it is changed by."""


def apply() -> None:
    """Apply every patch."""
    remember_bad_epochs()
    step_after_the_last_epoch()
    remember_updates_of_moving_averages()
    remember_loss_scaler()


def remember_bad_epochs() -> None:
    """``reduce_lr_on_plateau`` counts epochs without an improvement anew when it resumes, and
    without optimizer state it begins with the first learning rate. Stores both. Can go when
    fairseq does."""

    @functools.wraps(ReduceLROnPlateauLRSchedule.state_dict)
    def state_dict(self: ReduceLROnPlateauLRSchedule) -> dict[str, Any]:
        counted = {"num_bad_epochs": self.lr_scheduler.num_bad_epochs}
        return {**original_state(self), **counted, "lr": self.optimizer.get_lr()}

    @functools.wraps(ReduceLROnPlateauLRSchedule.load_state_dict)
    def load_state_dict(self: ReduceLROnPlateauLRSchedule, state: dict[str, Any]) -> None:
        original_load(self, state)
        if "num_bad_epochs" in state:  # not from another version
            self.lr_scheduler.num_bad_epochs = state["num_bad_epochs"]
            self.optimizer.set_lr(state["lr"])

    original_state = ReduceLROnPlateauLRSchedule.state_dict
    original_load = ReduceLROnPlateauLRSchedule.load_state_dict
    replace_once(ReduceLROnPlateauLRSchedule, "state_dict", state_dict)
    replace_once(ReduceLROnPlateauLRSchedule, "load_state_dict", load_state_dict)


def step_after_the_last_epoch() -> None:
    """fairseq saves at the end of an epoch, and tells the schedule the validation loss after that:
    a training that resumes from there never does. Does it then. Can go when fairseq saves last."""

    @functools.wraps(Trainer.load_checkpoint)
    def load_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        extra_state = original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs).arguments
        if extra_state is None or call.get("reset_optimizer") or call.get("reset_lr_scheduler"):
            return extra_state
        data, loss = extra_state.get("train_iterator", {}), extra_state.get("val_loss")
        if loss is not None and data.get("iterations_in_epoch") == 0:
            self.lr_step(data["epoch"] - 1, loss)
        return extra_state

    original = Trainer.load_checkpoint
    signature = inspect.signature(original)
    replace_once(Trainer, "load_checkpoint", load_checkpoint)


def remember_updates_of_moving_averages() -> None:
    """``--ema-update-freq`` counts updates anew when training resumes, and averages other ones.
    Goes by all updates. Can go when fairseq does."""

    @functools.wraps(Trainer.load_checkpoint)
    def load_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        extra_state = original(self, *args, **kwargs)
        if extra_state is not None and self.cfg.ema.store_ema:
            updates = self.get_num_updates()
            self.ema.update_freq_counter = updates % self.cfg.ema.ema_update_freq
        return extra_state

    original = Trainer.load_checkpoint
    replace_once(Trainer, "load_checkpoint", load_checkpoint)


def remember_loss_scaler() -> None:
    """``--fp16`` counts the updates since the loss scale changed anew when it resumes, so that
    trainings that are often interrupted never raise it; ``--amp`` begins with the first scale.
    Stores what a scale is changed by. Can go when fairseq does."""

    @functools.wraps(Trainer.save_checkpoint)
    def save_checkpoint(self: Trainer, filename: str, extra_state: dict[str, Any]) -> Any:
        if state := loss_scaler_state(self):
            extra_state = {**extra_state, LOSS_SCALER: state}
        return original_save(self, filename, extra_state)

    @functools.wraps(Trainer.load_checkpoint)
    def load_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        extra_state = original_load(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs).arguments
        if extra_state is None or call.get("reset_optimizer"):
            return extra_state
        saved, own = extra_state.get(LOSS_SCALER, {}), loss_scaler_state(self)
        if own and saved.keys() == own.keys():  # of the same kind of training
            scaler = self.optimizer.scaler
            if isinstance(scaler, DynamicLossScaler):
                vars(scaler).update(saved)
            else:
                scaler.load_state_dict(saved)
        return extra_state

    original_save, original_load = Trainer.save_checkpoint, Trainer.load_checkpoint
    signature = inspect.signature(original_load)
    replace_once(Trainer, "save_checkpoint", save_checkpoint)
    replace_once(Trainer, "load_checkpoint", load_checkpoint)


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
