"""Repairs of fairseq (``ve-fairseq`` 0.12.3) for today's Python, NumPy and PyTorch.

Each function is one repair: what breaks, and when it can go. All are safe to apply twice.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from fairseq.models.ema.ema import EMA
from fairseq.trainer import Trainer
from fairseq_cli import train as train_command

from .errors import UsageError
from .precision import check_precision

logger = logging.getLogger(__name__)


def apply() -> None:
    """Apply every repair."""
    refuse_half_precision_on_cpu()
    leave_finished_runs_alone()
    copy_integers_into_moving_averages()
    keep_versions_in_moving_averages()


def refuse_half_precision_on_cpu() -> None:
    """On a CPU a training with ``--fp16`` fails inside the optimizer, and ``--amp`` does nothing.
    Can go when fairseq says so itself."""

    @functools.wraps(Trainer.__init__)
    def __init__(self: Trainer, cfg: Any, *args: Any, **kwargs: Any) -> None:
        if cfg.common.amp and cfg.common.bf16:
            # fairseq would scale the loss of a model in bf16, and compute some of it in fp16.
            raise UsageError("--amp: not with --bf16")
        check_precision(cfg.common, ("fp16", "amp"))
        original(self, cfg, *args, **kwargs)

    original = Trainer.__init__
    replace_once(Trainer, "__init__", __init__)


def leave_finished_runs_alone() -> None:
    """``fairseq-train``, run again when its training has ended, trains one update more, or to the
    next validation, and stores it. Can go when fairseq looks before it trains."""

    @functools.wraps(train_command.train)
    def train(cfg: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> tuple[list[None], bool]:
        if reason := reason_to_stop(cfg, trainer):
            logger.info(f"nothing to train: {reason}")
            return [None], True
        return original(cfg, trainer, *args, **kwargs)

    original = train_command.train
    replace_once(train_command, "train", train)


def reason_to_stop(cfg: Any, trainer: Trainer) -> str | None:
    """Return, in words, why a training that begins has ended already, or ``None``.

    The number of epochs and ``--stop-min-lr`` are not looked at, since fairseq does that in time.
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


def copy_integers_into_moving_averages() -> None:
    """``--store-ema`` averages buffers too, and fails on whole numbers, such as hash tables. Can go
    when fairseq copies them."""

    @functools.wraps(EMA.__init__)
    def __init__(self: EMA, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, model, *args, **kwargs)
        state = model.state_dict()
        self.skip_keys = {*self.skip_keys, *(k for k in state if not state[k].is_floating_point())}

    original = EMA.__init__
    replace_once(EMA, "__init__", __init__)


def keep_versions_in_moving_averages() -> None:
    """``--store-ema`` updates its model without the modules' versions, which a Transformer takes
    for those of an old checkpoint, and drops its last layer norm. Can go when fairseq gives
    them."""

    @functools.wraps(EMA.restore)
    def restore(self: EMA, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        own = self.model.state_dict()
        versions = {key: own[key] for key in own if key.endswith("version")}
        original(self, {**versions, **state_dict}, *args, **kwargs)

    original = EMA.restore
    replace_once(EMA, "restore", restore)


def replace_once(
    owner: Any, name: str, function: Callable[..., Any], wrap: Callable[..., Any] = lambda f: f
) -> None:
    """Set an attribute, unless the same repair has set it, or one that others went on from.

    ``python -m fairseq_cli.eval_lm`` runs a second copy of the module, ``__main__``, which gets the
    attribute too.
    """
    repair, done = function.__code__.co_qualname, getattr(getattr(owner, name), "sffn_repairs", ())
    if repair in done:
        return
    function.sffn_repairs = (*done, repair)  # type: ignore[attr-defined]
    setattr(owner, name, wrap(function))
    command = sys.modules.get("__main__")
    spec = getattr(command, "__spec__", None)
    if isinstance(owner, types.ModuleType) and getattr(spec, "name", None) == owner.__name__:
        setattr(command, name, wrap(function))
