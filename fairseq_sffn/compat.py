"""Repairs of fairseq (``ve-fairseq`` 0.12.3) for today's Python, NumPy and PyTorch.

Each function is one repair: what breaks, and when it can go. All are safe to apply twice.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq_cli import eval_lm as eval_command

from .errors import UsageError

logger = logging.getLogger(__name__)


def apply() -> None:
    """Apply every repair."""
    restore_numpy_compat()
    evaluate_at_the_model_context()
    deal_the_same_batches_when_resumed()


def restore_numpy_compat() -> None:
    """``np.compat.long`` left NumPy in 2.0, but TokenBlockDataset uses it (``--sample-break-mode
    eos``, generation). Can go when fairseq no longer does."""
    if not hasattr(np, "compat"):
        np.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]


def evaluate_at_the_model_context() -> None:
    """``fairseq-eval-lm`` leaves out every sample that is longer than the model's positions: with
    its default ``--tokens-per-sample 1024`` that is the whole text for a model trained on less, and
    it prints a perplexity of 1.00. Can go when fairseq evaluates or refuses."""

    @functools.wraps(LanguageModelingTask.eval_lm_dataloader)
    def eval_lm_dataloader(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        max_positions, window = given["max_positions"], given["context_window"]
        # A caller's own dataset cannot be cut anew.
        splits = [name for name, of in self.datasets.items() if of is given["dataset"]]
        if max_positions is None or not splits:
            return original(*call.args, **call.kwargs)
        asked = self.args.tokens_per_sample
        if asked + window > max_positions:
            if window >= max_positions:
                raise UsageError(
                    f"--context-window {window}: the model has {max_positions} positions"
                )
            self.args.tokens_per_sample = max_positions - window
            logger.warning(
                f"--tokens-per-sample {asked + window}: the model has {max_positions} "
                f"positions; evaluating at {max_positions}"
            )
            self.load_dataset(splits[0])
            given["dataset"] = self.dataset(splits[0])
        return original(*call.args, **call.kwargs)

    @functools.wraps(eval_command.main)
    def main(cfg: Any, **kwargs: Any) -> Any:
        window, length = cfg.eval_lm.context_window, getattr(cfg.task, "tokens_per_sample", None)
        if length is not None and window >= length:
            raise UsageError(
                f"--context-window {window}: leaves nothing of --tokens-per-sample {length}"
            )
        return original_main(cfg, **kwargs)

    original_main = eval_command.main
    replace_once(eval_command, "main", main)
    original = LanguageModelingTask.eval_lm_dataloader
    signature = inspect.signature(original)
    replace_once(LanguageModelingTask, "eval_lm_dataloader", eval_lm_dataloader)


def deal_the_same_batches_when_resumed() -> None:
    """fairseq deals sentences to batches by the seed and the epoch that a command starts in, and
    keeps the batches for later epochs: resumed in a later one, it would deal others. Deals by the
    first epoch wherever batches are kept. Can go when fairseq does."""

    @functools.wraps(FairseqTask.get_batch_iterator)
    def get_batch_iterator(self: FairseqTask, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        dataset, epoch = given["dataset"], given["epoch"]
        kept = (
            self.can_reuse_epoch_itr(dataset)
            and not given["disable_iterator_cache"]
            and not given["update_epoch_batch_itr"]
            and not getattr(self.cfg, "rebuild_batches", False)
        )
        if not kept or dataset in self.dataset_to_epoch_iter:
            return original(*call.args, **call.kwargs)
        given["epoch"] = 1
        iterator = original(*call.args, **call.kwargs)
        iterator.epoch = epoch
        dataset.set_epoch(epoch)
        return iterator

    original = FairseqTask.get_batch_iterator
    signature = inspect.signature(original)
    replace_once(FairseqTask, "get_batch_iterator", get_batch_iterator)


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
