"""fairseq's half and mixed precision (``--bf16``, ``--amp``) on GPUs and CPUs.

Each function is one repair, as those of :mod:`.compat`: what breaks, and when it can go.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from fairseq.optim import AMPOptimizer
from fairseq.trainer import Trainer

from .compat import replace_once


def apply() -> None:
    """Apply every repair."""
    unscale_once()
    validate_in_the_precision_of_training()


def unscale_once() -> None:
    """fairseq's AMPOptimizer divides gradients by the loss scale to clip them, and PyTorch's
    GradScaler divides them again before the step, since it is given another optimizer, the one
    around. Gives it the same one. Can go when fairseq does."""

    @functools.wraps(AMPOptimizer.step)
    def step(self: AMPOptimizer) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    replace_once(AMPOptimizer, "step", step)


def validate_in_the_precision_of_training() -> None:
    """fairseq trains under autocast with ``--amp``, and validates without. Validates under it too.
    Can go when its ``valid_step`` does as its ``train_step``."""

    @functools.wraps(Trainer.valid_step)
    def valid_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device.type, enabled=bool(self.cfg.common.amp)):
            return original(self, *args, **kwargs)

    original = Trainer.valid_step
    replace_once(Trainer, "valid_step", valid_step)
