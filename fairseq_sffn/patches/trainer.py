"""fairseq's trainer, extended for sparse layers and several processes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fairseq.data.iterators import EpochBatchIterator
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from ..checkpoints.writing import take_over_asynchronous_writing
from ..errors import UsageError
from ..expert_parallel.settings import check_and_compare_settings
from ..models.plugin_model import plugin_model_in
from ..options.configuration import as_configuration, batches_of_any_size
from ..precision import check_precision
from .checks import check_criterion, check_options
from .left_out import LeftOut, left_out
from .registry import NEEDED, patch
from .trainer_checkpoints import CheckpointTrainer
from .trainer_steps import StepTrainer
from .training_state import forget_other_trainings
from .workers import keep_workers


class SFFNTrainer(StepTrainer, CheckpointTrainer):
    """Trains models in one process or several.

    Args:
        cfg: the configuration. An ``argparse.Namespace`` is converted.
        task, model, criterion, quantizer: see fairseq's trainer.

    Attributes:
        metric_checked: whether validation is known to give ``--best-checkpoint-metric``.

    Raises:
        UsageError: options, model and criterion do not fit together, or differ between ranks.
    """

    def __init__(
        self, cfg: Any, task: Any, model: Any, criterion: Any, quantizer: Any = None
    ) -> None:
        cfg = as_configuration(cfg)
        check_and_compare_settings(cfg)
        if (ours := plugin_model_in(model)) is not None:
            check_options(cfg, ours)
            name = getattr(cfg.criterion, "_name", None) or type(criterion).__name__
            check_criterion(ours, criterion, str(name))
        if cfg.common.amp and cfg.common.bf16:
            # fairseq would scale the loss of a bf16 model, and compute some operations in fp16.
            raise UsageError("--amp: not with --bf16")
        check_precision(cfg.common, ("fp16", "amp"))
        take_over_asynchronous_writing(cfg.checkpoint)
        forget_other_trainings()
        self.metric_checked = False
        self._left_out: LeftOut | None = None
        super().__init__(cfg, task, model, criterion, quantizer)

    def get_train_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Return an iterator over the training set."""
        try:
            return keep_workers(super().get_train_iterator(*args, **kwargs))
        except BaseException:
            self.stop_receiving()  # no epoch follows
            raise

    def get_valid_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Return an iterator over a validation set, its last batch included."""
        with batches_of_any_size(self.cfg.dataset):
            iterator = super().get_valid_iterator(*args, **kwargs)
        self._left_out = None
        if isinstance(iterator, EpochBatchIterator):
            used = [index for batch in iterator.frozen_batches for index in batch]
            every = np.arange(len(iterator.dataset))
            self._left_out = left_out(iterator.dataset, used, every)
        return keep_workers(iterator)

    def train_step(self, samples: list[Any], raise_oom: bool = False) -> Any:
        """Do forward, backward and parameter update.

        Raises:
            UsageError: the background thread could not write a checkpoint.
        """
        result = super().train_step(samples, raise_oom)
        if self.writer is not None:
            self.writer.check()  # after each update, so that no more updates are lost
        return result

    def valid_step(self, sample: Any, raise_oom: bool = False) -> Any:
        """Do a forward pass in evaluation mode.

        The function also logs what the validation set leaves out, and saves after a signal.
        """
        result = super().valid_step(sample, raise_oom)
        if self._left_out is not None:
            log_left_out(self._left_out)
        # With ``raise_oom``, fairseq repeats a step only on the rank that ran out of memory.
        if self.interruption is not None and not raise_oom and self.interruption.agree():
            self.interruption.save()
        return result


def log_left_out(found: LeftOut) -> None:
    """Log what ``--skip-invalid-size-inputs-valid-test`` leaves out of a validation."""
    unit, number, of = "samples", found.samples, found.of_samples
    if found.tokens is not None and found.of_tokens is not None:
        unit, number, of = "tokens", found.tokens, found.of_tokens
    for place, (name, count) in enumerate({f"left_out_{unit}": number, unit: of}.items()):
        # A tensor, because fairseq rounds other numbers to six digits.
        metrics.log_scalar(name, torch.tensor(count), weight=0, priority=10**6 + place)


def extended(cls: type[Trainer]) -> type[Trainer]:
    """Return a class of trainers with the methods of :class:`SFFNTrainer` below its own."""
    if issubclass(cls, SFFNTrainer):
        return cls
    if cls is Trainer:
        return SFFNTrainer
    return type(cls.__name__, (cls, SFFNTrainer), {"__module__": cls.__module__})


@patch(
    "fairseq.trainer:Trainer.__new__",
    why="fairseq's trainer averages the gradients of sharded blocks over all ranks, saves the "
    "blocks of one rank only, and does not restore all of its state.",
    until="fairseq lets a plugin name its trainer.",
    kind=NEEDED,
    written_for=("622643ab",),
    members=(
        *("__init__", "model", "criterion", "_build_optimizer", "_build_ema", "_prepare_sample"),
        *("train_step", "valid_step", "clip_grad_norm", "get_train_iterator", "get_valid_iterator"),
        *("state_dict", "save_checkpoint", "load_checkpoint"),
    ),
)
def new_trainer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make a :class:`SFFNTrainer` wherever a program makes a trainer.

    A program may have imported the class, or derived its own from it, before the plugin.
    """

    @functools.wraps(original)
    def __new__(cls: type[Trainer], *args: Any, **kwargs: Any) -> Trainer:
        return object.__new__(extended(cls))

    return __new__
