"""Training that a signal interrupts: it finishes the update, saves, and ends with status 128 + n.

Each function that ``apply`` calls is one change of fairseq, safe to apply twice.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.data.iterators import EpochBatchIterator, GroupedEpochBatchIterator
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from fairseq_cli import train as train_command

from .compat import replace_once
from .expert_parallel.launch import is_launched
from .signals import SignalReceiver, survive_signals_of_others

logger = logging.getLogger(__name__)


def apply() -> None:
    """Apply every change."""
    save_when_interrupted()
    load_data_until_the_end()


class Interruption:
    """What an epoch of training does about signals.

    Args:
        cfg: configuration of the training.
        trainer: its trainer.
        epoch_itr: iterator over the epoch, whose position a checkpoint stores.
        receiver: receives this process's signals.

    Attributes:
        receiver: as given.
        number: the signal that ends the training, the same on every rank, or 0.
        saved: whether fairseq has saved since this was set to ``False``.
        val_loss: the first loss of the last validation, where one was done after this update.
    """

    def __init__(
        self, cfg: Any, trainer: Trainer, epoch_itr: Any, receiver: SignalReceiver
    ) -> None:
        self.number = 0
        self.saved = False
        self.val_loss: float | None = None
        self._cfg, self._trainer, self._epoch_itr = cfg, trainer, epoch_itr
        self.receiver = receiver

    def agree(self) -> bool:
        """Let all ranks know of a signal that one of them has received.

        Returns:
            Whether they did not know of one before.
        """
        if self.number:
            return False
        self.number = self.receiver.received
        if is_distributed():
            number = torch.tensor([self.number], device=self._trainer.device)
            group = distributed_utils.get_global_group()
            dist.all_reduce(number, op=dist.ReduceOp.MAX, group=group)
            self.number = int(number)
        return self.number > 0

    def save(self) -> None:
        """Save, without making the validation loss a candidate for the best one."""
        checkpoint = self._cfg.checkpoint
        path = checkpoint_utils.save_checkpoint(checkpoint, self._trainer, self._epoch_itr, None)
        if self._trainer.is_data_parallel_master and path is None:
            flag = "--no-save" if checkpoint.no_save else "--no-last-checkpoints"
            updates = self._trainer.get_num_updates()
            logger.warning(f"{self.name}: {flag}: update {updates} is not saved")
        self.saved = False

    def leave(self) -> None:
        """End the command, together with all ranks.

        Raises:
            SystemExit: always, with status 128 + the signal's number.
        """
        self.receiver.leaving = True
        if is_distributed():
            dist.barrier(group=distributed_utils.get_global_group())
        updates = self._trainer.get_num_updates()
        logger.info(f"{self.name}: the training ends at update {updates}")
        raise SystemExit(128 + self.number)

    @property
    def name(self) -> str:
        """Name of the signal."""
        return signal.Signals(self.number).name


current: ContextVar[Interruption | None] = ContextVar("interruption", default=None)
"""The epoch that is being trained."""


def save_when_interrupted() -> None:
    """fairseq ends at once at SIGINT, SIGTERM and SIGUSR1, and loses all updates since the last
    checkpoint. Can go when it saves.

    The checkpoint is written before a validation that is due, since a scheduler may not wait for
    that. If it does, the validation counts as in a training that is not interrupted.
    """

    @functools.wraps(train_command.train)
    def train(
        cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if cfg.common.tpu:
            return original_train(cfg, trainer, task, epoch_itr, *args, **kwargs)
        with SignalReceiver(peers(), is_launched()) as receiver:
            interruption = Interruption(cfg, trainer, epoch_itr, receiver)
            token = current.set(interruption)
            try:
                result = original_train(cfg, trainer, task, epoch_itr, *args, **kwargs)
                if interruption.agree() and not interruption.saved:
                    interruption.save()
                if interruption.number:
                    interruption.leave()
            except Exception as error:
                number = interruption.number or receiver.received
                if not number or not is_of_a_lost_peer(error):
                    raise
                name = signal.Signals(number).name
                line = f"{name}: another process of the training has ended: {first_line(error)}"
                print(line, file=sys.stderr, flush=True)
                raise SystemExit(128 + number) from None
            finally:
                current.reset(token)
        if receiver.received:  # after the ranks agreed that there was none
            signal.raise_signal(receiver.received)
        return result

    @functools.wraps(train_command.validate_and_save)
    def validate_and_save(*args: Any, **kwargs: Any) -> tuple[list[float | None], bool]:
        interruption = current.get()
        if interruption is None:
            return original(*args, **kwargs)
        interruption.saved, interruption.val_loss = False, None
        if interruption.agree():
            interruption.save()
        losses, should_stop = original(*args, **kwargs)
        interruption.val_loss = losses[0]
        validated = losses != [None]
        if interruption.number:
            unsaved = validated  # what the validation changed
        else:  # what takes time may have been interrupted
            unsaved = (validated or interruption.saved) and interruption.agree()
        if unsaved and not interruption.saved:
            interruption.save()
        call = signature.bind(*args, **kwargs).arguments
        # Otherwise ``train`` logs the epoch and returns first.
        if interruption.number and not (should_stop or call["end_of_epoch"]):
            interruption.leave()
        return losses, should_stop

    @functools.wraps(Trainer.valid_step)
    def valid_step(self: Trainer, sample: Any, raise_oom: bool = False) -> Any:
        result = original_step(self, sample, raise_oom)
        interruption = current.get()
        # With ``raise_oom`` fairseq repeats a step on the one rank that ran out of memory.
        if interruption is not None and not raise_oom and interruption.agree():
            interruption.save()
        return result

    @functools.wraps(Trainer.save_checkpoint)
    def save_of_trainer(self: Trainer, filename: str, extra_state: dict[str, Any]) -> Any:
        interruption = current.get()
        loss = None if interruption is None else interruption.val_loss
        if loss is not None and extra_state.get("val_loss") is None:
            # At the end of an epoch the schedule of the learning rate has yet to be told.
            extra_state = {**extra_state, "val_loss": loss}
        return original_of_trainer(self, filename, extra_state)

    @functools.wraps(checkpoint_utils.save_checkpoint)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path = original_save(*args, **kwargs)
        if (interruption := current.get()) is not None:
            interruption.saved = True
        return path

    original_train, original = train_command.train, train_command.validate_and_save
    original_step, original_save = Trainer.valid_step, checkpoint_utils.save_checkpoint
    original_of_trainer = Trainer.save_checkpoint
    signature = inspect.signature(original)
    replace_once(train_command, "train", train)
    replace_once(train_command, "validate_and_save", validate_and_save)
    replace_once(Trainer, "valid_step", valid_step)
    replace_once(checkpoint_utils, "save_checkpoint", save_checkpoint)
    replace_once(Trainer, "save_checkpoint", save_of_trainer)


def load_data_until_the_end() -> None:
    """A signal to a group of processes ends the workers that load data too, and the update that
    waits for them fails. Keeps them until the training ends. Can go when fairseq passes a
    ``worker_init_fn`` that does."""

    def keeping(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _get_iterator_for_epoch(*args: Any, **kwargs: Any) -> Any:
            loader = torch.utils.data.DataLoader
            # fairseq has no option for it, and may start the workers before it returns.
            torch.utils.data.DataLoader = functools.partial(  # type: ignore[misc, assignment]
                loader, worker_init_fn=survive_signals_of_others
            )
            try:
                return original(*args, **kwargs)
            finally:
                torch.utils.data.DataLoader = loader  # type: ignore[misc]

        return _get_iterator_for_epoch

    for kind in (EpochBatchIterator, GroupedEpochBatchIterator):
        replace_once(kind, "_get_iterator_for_epoch", keeping(kind._get_iterator_for_epoch))


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def peers() -> list[int]:
    """Ids of the other ranks' processes that this process can see."""
    if not is_distributed():
        return []
    own = (process_namespace(), os.getpid())
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own, group=distributed_utils.get_global_group())
    return [number for namespace, number in ranks if namespace == own[0] and number != own[1]]


def process_namespace() -> tuple[str, int]:
    """Identify the processes that have ids of their own: a machine's, or a container's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return boot, os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        return str(uuid.uuid4()), 0


def is_of_a_lost_peer(error: Exception) -> bool:
    """Whether a collective operation failed, as it does when another rank has ended."""
    if not is_distributed():
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
