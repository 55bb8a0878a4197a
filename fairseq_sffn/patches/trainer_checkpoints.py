"""Saving and loading of checkpoints by the trainer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from omegaconf import open_dict

from ..checkpoints.loading import KEY, fingerprints
from ..checkpoints.part_files import TRAINED, folder_named_by, named_parts, new_folder
from ..checkpoints.reading import read_file
from ..checkpoints.shared_folder import see_together
from ..checkpoints.writing import IN_BACKGROUND, Writer, write_checkpoint
from ..errors import UsageError
from ..expert_parallel.gradients import expert_parallel_of
from ..expert_parallel.parts import Part, take_parts
from ..expert_parallel.saving import part_of, save_together, write_parts
from ..ranks import agreed, rank
from . import training_state
from .interruptions import Interruption
from .signals import SignalReceiver

logger = logging.getLogger(__name__)


class ForTraining(NamedTuple):
    """Needs of a trainer that loads a checkpoint.

    Attributes:
        part: the part of the sharded parameters.
        average: whether the trainer needs a moving average.
        verified: real paths of files whose checksums were already compared.
    """

    part: Part
    average: bool
    verified: frozenset[str]


loading_for: ContextVar[ForTraining | None] = ContextVar("loading_for", default=None)
"""Set while a trainer loads a checkpoint. fairseq's reading function has no argument for it."""


class CheckpointTrainer(Trainer):
    """A trainer that saves and restores all state of a training, in parts if blocks are sharded.

    Attributes:
        receiver: the receiver of signals from the first epoch to the last; ``None`` at other times.
        receiving: the context of the receiver.
        interruption: the handling of signals during an epoch; ``None``: outside of an epoch.
        writer: the thread that writes checkpoints, with ``--write-checkpoints-asynchronously``.
        verified: real paths of files of the checkpoint whose checksums were already compared.
    """

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        self.receiver: SignalReceiver | None = None
        self.receiving = ExitStack()
        self.interruption: Interruption | None = None
        self.writer = Writer() if getattr(cfg.checkpoint, IN_BACKGROUND, False) else None
        self.verified: frozenset[str] = frozenset()
        self._saves_together = False
        self._folder: Path | None = None
        super().__init__(cfg, *args, **kwargs)

    def stop_receiving(self) -> None:
        """Give signals the effect that they had before the training."""
        self.receiving.close()
        self.receiver = None

    def save_with_parts(self, cfg: Any, save: Any) -> Any:
        """Save checkpoints with the parts of all ranks.

        Args:
            cfg: the group ``checkpoint``.
            save: fairseq's function, without arguments.
        """
        self._saves_together = True
        try:
            return save_together(self, Path(cfg.save_dir), save)
        finally:
            self._saves_together = False

    def save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> str | None:
        """Save all training state in a file.

        If blocks are sharded, all ranks write their parts first. If fairseq saves after a failure,
        a sharded checkpoint is not written.

        Args:
            filename: the file.
            extra_state: fairseq's state outside of the trainer.

        Returns:
            Path of the file; ``None``: this rank writes no file.

        Raises:
            UsageError: a file cannot be written.
        """
        sharded = expert_parallel_of(self.get_model()) > 1
        if sharded and not self._saves_together:
            # fairseq saves on the rank that fails. The other ranks do not save their parts.
            logger.warning(f"{filename}: not written, since this rank has its own blocks only")
            return None
        if not self.should_save_checkpoint_on_current_rank:
            return None
        if sharded:
            self._folder = new_folder(filename, f"{TRAINED}{self.get_num_updates()}")
            write_parts(self, self._folder)
        path = os.path.abspath(filename)
        logger.info(f"Saving checkpoint to {path}")
        state = utils.move_to_cpu(self.state_dict())
        state["extra_state"] |= extra_state | training_state.extra_state(self)
        loss = None if self.interruption is None else self.interruption.val_loss
        if loss is not None and extra_state.get("val_loss") is None:
            # At the end of an epoch, the learning rate schedule still needs this loss.
            state["extra_state"]["val_loss"] = loss
        write_checkpoint(state, filename)
        logger.info(f"Finished saving checkpoint to {path}")
        return path

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the training.

        It has fairseq's entries and the names of the parameters. If blocks are sharded, it names
        the folder of the parts in place of the sharded parameters.
        """
        state = super().state_dict()
        if isinstance(state["cfg"], dict):  # fairseq's own options only
            state["cfg"]["checkpoint"].pop(IN_BACKGROUND, None)
        schedule = state["optimizer_history"][-1]["lr_scheduler_state"]
        if counted := training_state.schedule_state(self.lr_scheduler):
            state["optimizer_history"][-1]["lr_scheduler_state"] = schedule | counted
        if self.is_fsdp:  # its flat parameters have no names of their own
            return state
        part = part_of(self)
        state[KEY] = {"parameters": part.parameters, "sharded": list(part.sharded)}
        if part.shards > 1:
            assert self._folder is not None
            state[KEY] |= {"folder": self._folder.name, "shards": part.shards}
            take_parts(state, part)
        state[KEY] |= fingerprints(state["model"], in_parts=part.shards > 1)
        return state

    def load_checkpoint(
        self,
        filename: str,
        reset_optimizer: bool = False,
        reset_lr_scheduler: bool = False,
        optimizer_overrides: dict[str, Any] | None = None,
        reset_meters: bool = False,
    ) -> dict[str, Any] | None:
        """Load all training state from a checkpoint with any number of parts.

        The stored configuration is ignored, because training has its own.

        Args:
            filename: the checkpoint.
            reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters: see fairseq.

        Returns:
            fairseq's state outside of the trainer; ``None``: there is no checkpoint.

        Raises:
            UsageError: training cannot resume from the checkpoint.
        """
        try:
            with self._loading(filename, reset_optimizer):
                extra_state = super().load_checkpoint(
                    *(filename, reset_optimizer, reset_lr_scheduler, optimizer_overrides),
                    reset_meters=reset_meters,
                )
        except Exception as error:
            if not is_about_content(error):
                raise
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UsageError(
                f"checkpoint {filename}: training cannot go on from it: {reason}"
            ) from error
        if extra_state is None:
            return None
        training_state.restore_arrays_of_meters(extra_state)
        if not reset_meters:
            training_state.restore_early_stopping(extra_state)
        if not reset_optimizer:
            self._restore_progress(filename, extra_state, reset_lr_scheduler)
        if self.cfg.ema.store_ema:  # fairseq would count updates anew
            self.ema.update_freq_counter = self.get_num_updates() % self.cfg.ema.ema_update_freq
        if not reset_optimizer:
            training_state.restore_loss_scaler(self, extra_state)
        return extra_state

    def _restore_progress(
        self, filename: str, extra_state: dict[str, Any], reset_lr_scheduler: bool
    ) -> None:
        """Continue at the stored update and in its schedule, also without optimizer state."""
        last = self._optim_history[-1]
        stored, without = last.get("num_updates"), not self.get_num_updates()
        if not reset_lr_scheduler and stored:
            schedule = last["lr_scheduler_state"]
            if without:
                self.lr_scheduler.load_state_dict(schedule)
            training_state.restore_schedule(self.lr_scheduler, schedule, restore_lr=without)
        if without and stored:
            self.set_num_updates(stored)
            logger.warning(
                f"{filename}: has no optimizer state; training goes on at update {stored}, and the "
                "optimizer begins anew (--reset-optimizer begins at update 0)"
            )
        data, loss = extra_state.get("train_iterator", {}), extra_state.get("val_loss")
        if not reset_lr_scheduler and loss is not None and data.get("iterations_in_epoch") == 0:
            # At the end of an epoch, fairseq saves before it passes the loss to the schedule.
            self.lr_step(data["epoch"] - 1, loss)

    @contextmanager
    def _loading(self, filename: str, reset_optimizer: bool) -> Iterator[None]:
        """Return a context in which fairseq reads what this process needs of a checkpoint."""
        if self.is_fsdp:
            part, on_all_ranks = Part(), False
        else:
            part = part_of(self)._replace(reset_optimizer=reset_optimizer)
            parts = agreed(parts_of(filename) if rank() == 0 else [])
            on_all_ranks = part.shards > 1 or bool(parts)
            if on_all_ranks and not PathManager.path_requires_pathmanager(filename):
                see_together([Path(filename), *parts])
        options = self.cfg.checkpoint
        before = options.load_checkpoint_on_all_dp_ranks
        token = loading_for.set(ForTraining(part, self.cfg.ema.store_ema, self.verified))
        with open_dict(options):
            options.load_checkpoint_on_all_dp_ranks = before or on_all_ranks
        try:
            # Rank 0 sends this class to the others in place of tensors.
            with torch.serialization.safe_globals([distributed_utils._TensorPlaceholder]):
                yield
        finally:
            loading_for.reset(token)
            with open_dict(options):
                options.load_checkpoint_on_all_dp_ranks = before


def parts_of(filename: str) -> list[Path]:
    """Return the files of a checkpoint's parts: none if it does not exist, or is not sharded."""
    if not PathManager.isfile(filename):
        return []
    local = PathManager.get_local_path(filename)
    state = read_file(local, verify=False, mapped=True)
    return [] if folder_named_by(state) is None else named_parts(Path(local), state[KEY])


def is_about_content(error: Exception) -> bool:
    """Return whether an error comes from the content of a checkpoint.

    Other errors come from the machine or from another process.
    """
    odd = (AssertionError, AttributeError, LookupError, TypeError, ValueError)
    return isinstance(error, odd) or type(error) is Exception
