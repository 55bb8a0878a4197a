"""Interruption of training by a signal.

Training finishes its update, saves, and ends with status 128 + the signal's number. If a validation
is due, training saves before it, because a scheduler may not wait. If the scheduler waits, the
validation counts as in uninterrupted training.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils

from ..expert_parallel.launch import is_launched
from ..expert_parallel.peers import is_distributed, is_of_a_lost_peer
from ..ranks import gathered
from .signals import SignalReceiver

logger = logging.getLogger(__name__)


class Interruption:
    """Handling of signals during an epoch of training.

    Args:
        cfg: configuration of the training.
        trainer: its trainer.
        epoch_itr: iterator over the epoch, whose position a checkpoint stores.
        receiver: receiver of this process's signals.

    Attributes:
        receiver: the same receiver.
        goes_on: whether another epoch is known to follow. Signals between them wait for it.
        number: number of the signal that ends the training, the same on every rank, or 0.
        saved: whether a checkpoint was saved since the attribute was set to ``False``.
        val_loss: first loss of the validation after this update; ``None``: there was none.
    """

    def __init__(self, cfg: Any, trainer: Any, epoch_itr: Any, receiver: SignalReceiver) -> None:
        self.number = 0
        self.saved = False
        self.val_loss: float | None = None
        self._cfg, self._trainer, self._epoch_itr = cfg, trainer, epoch_itr
        self.receiver = receiver
        self.goes_on = False

    def agree(self) -> bool:
        """Tell all ranks of a signal that one of them has received. All ranks call it together.

        Returns:
            Whether there is a signal that the ranks did not know before.
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
        """Save a checkpoint, without a validation loss for the choice of the best checkpoint."""
        checkpoint = self._cfg.checkpoint
        path = checkpoint_utils.save_checkpoint(checkpoint, self._trainer, self._epoch_itr, None)
        if self._trainer.is_data_parallel_master and path is None:
            flag = "--no-save" if checkpoint.no_save else "--no-last-checkpoints"
            updates = self._trainer.get_num_updates()
            logger.warning(f"{self.name}: {flag}: update {updates} is not saved")
        self.saved = False

    def leave(self) -> None:
        """End the command on all ranks together.

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


@contextmanager
def interruptible(cfg: Any, trainer: Any, epoch_itr: Any) -> Iterator[Interruption]:
    """Return a context in which signals wait for the end of an update.

    It sets ``trainer.interruption``. If another epoch follows, signals also wait after it: for the
    end of the next epoch's first update.

    Args:
        cfg: configuration of the training.
        trainer: its trainer.
        epoch_itr: iterator over the epoch.

    Yields:
        The interruption.

    Raises:
        SystemExit: another process of the training has ended after a signal.
    """
    if trainer.receiver is None:
        trainer.receiver = trainer.receiving.enter_context(SignalReceiver(peers(), is_launched()))
    receiver = trainer.receiver
    interruption = trainer.interruption = Interruption(cfg, trainer, epoch_itr, receiver)
    try:
        yield interruption
    except Exception as error:
        number = interruption.number or receiver.received
        if not number or not is_of_a_lost_peer(error):
            raise
        receiver.ending.acquire()  # its thread may have noticed the loss, and ends this process
        receiver.leaving = True
        name = signal.Signals(number).name
        line = f"{name}: another process of the training has ended: {first_line(error)}"
        print(line, file=sys.stderr, flush=True)
        raise SystemExit(128 + number) from None
    finally:
        trainer.interruption = None
        if not interruption.goes_on:
            trainer.stop_receiving()
    if receiver.received and not interruption.goes_on:
        # It came after the ranks had agreed that there was none.
        signal.raise_signal(receiver.received)


def peers() -> list[int]:
    """Return the process ids of the other ranks in this process's id namespace."""
    own = (process_namespace(), os.getpid())
    found = gathered(own)
    return [number for namespace, number in found if namespace == own[0] and number != own[1]]


def process_namespace() -> tuple[str, int]:
    """Return an identifier of the namespace of process ids, which a machine or a container has."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return boot, os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        return str(uuid.uuid4()), 0


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
