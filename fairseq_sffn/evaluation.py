"""What validation leaves out, and the last batch of it.

Each function is one wrapper, as those of :mod:`.compat`: what breaks, and when it can go.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from fairseq.data.iterators import EpochBatchIterator
from fairseq.trainer import Trainer
from fairseq_cli import train as train_command

from .compat import replace_once
from .options.configuration import batches_of_any_size
from .patches.left_out import LeftOut, left_out


def apply() -> None:
    """Apply every wrapper."""
    use_the_last_batch()
    count_what_validation_leaves_out()


def use_the_last_batch() -> None:
    """fairseq leaves out the last batch where its size is no multiple of
    ``--required-batch-size-multiple`` (8), in validation too. Can go when fairseq uses all."""

    @functools.wraps(Trainer.get_valid_iterator)
    def get_valid_iterator(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        with batches_of_any_size(self.cfg.dataset):
            return original(self, *args, **kwargs)

    original = Trainer.get_valid_iterator
    replace_once(Trainer, "get_valid_iterator", get_valid_iterator)


def count_what_validation_leaves_out() -> None:
    """The records of a validation do not tell that ``--skip-invalid-size-inputs-valid-test`` left
    something out. Adds ``left_out_tokens`` and ``tokens`` to them where it did. Can go when fairseq
    logs it."""

    @functools.wraps(Trainer.get_valid_iterator)
    def get_valid_iterator(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        iterator = original_iterator(self, *args, **kwargs)
        self.validation_leaves_out = None
        if isinstance(iterator, EpochBatchIterator):
            used = [index for batch in iterator.frozen_batches for index in batch]
            every = np.arange(len(iterator.dataset))
            self.validation_leaves_out = left_out(iterator.dataset, used, every)
        return iterator

    @functools.wraps(train_command.get_valid_stats)
    def get_valid_stats(cfg: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> dict[str, Any]:
        stats = original_stats(cfg, trainer, *args, **kwargs)
        found = getattr(trainer, "validation_leaves_out", None)
        if isinstance(found, LeftOut):
            # Tensors, since fairseq rounds other numbers to six digits.
            unit, number, of = "samples", found.samples, found.of_samples
            if found.tokens is not None and found.of_tokens is not None:
                unit, number, of = "tokens", found.tokens, found.of_tokens
            stats |= {f"left_out_{unit}": torch.tensor(number), unit: torch.tensor(of)}
        return stats

    original_iterator = Trainer.get_valid_iterator
    replace_once(Trainer, "get_valid_iterator", get_valid_iterator)
    original_stats = train_command.get_valid_stats
    replace_once(train_command, "get_valid_stats", get_valid_stats)
