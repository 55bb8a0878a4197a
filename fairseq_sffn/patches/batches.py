"""Patches of the functions with which fairseq's tasks make batches."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from fairseq.tasks import FairseqTask

from ..errors import UsageError
from .left_out import left_out
from .registry import MENDS_FAIRSEQ, patch

logger = logging.getLogger(__name__)


@patch(
    "fairseq.tasks:FairseqTask.filter_indices_by_size",
    why="fairseq says how many samples it leaves out, but not how many there are, and not how many "
    "tokens they have.",
    until="fairseq counts samples and tokens.",
    kind=MENDS_FAIRSEQ,
    written_for=("4665c28f",),
)
def filter_indices_by_size(original: Callable[..., Any]) -> Callable[..., Any]:
    """Log a warning with the numbers of samples and tokens that are left out."""

    @functools.wraps(original)
    def wrapper(self: FairseqTask, indices: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        kept = original(self, indices, dataset, *args, **kwargs)
        if found := left_out(dataset, kept, indices):
            logger.warning(f"left out: {found}")
        return kept

    return wrapper


@patch(
    "fairseq.tasks:FairseqTask.get_batch_iterator",
    why="Training that resumes in a later epoch has other batches than uninterrupted training. "
    "Without any batch, fairseq ends in a traceback, or trains on nothing forever.",
    until="fairseq seeds kept batches with the first epoch, and refuses to train without batches.",
    kind=MENDS_FAIRSEQ,
    written_for=("48e2ec8f",),
)
def get_batch_iterator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Seed kept batches with the first epoch, and refuse a split without batches.

    fairseq seeds batches with its seed and with the epoch in which a command starts.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapper(self: FairseqTask, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        dataset, epoch = given["dataset"], given["epoch"]
        is_kept = (
            self.can_reuse_epoch_itr(dataset)
            and not given["disable_iterator_cache"]
            and not given["update_epoch_batch_itr"]
            and not getattr(self.cfg, "rebuild_batches", False)
        )
        is_new = is_kept and dataset not in self.dataset_to_epoch_iter
        # Only splits must have batches. A caller's own data, such as a line of
        # fairseq-interactive, may be empty.
        is_split = any(dataset is split for split in self.datasets.values())
        if is_new:
            given["epoch"] = 1
        try:
            iterator = original(*call.args, **call.kwargs)
            # The trainer asks first, and freezes the batches at once.
            is_empty = is_split and getattr(iterator, "frozen_batches", None) == ()
        except IndexError:  # fairseq reads the last batch without a check
            if is_split:
                refuse_no_batches(given)
            raise
        if is_empty:
            refuse_no_batches(given)
        if is_new:
            iterator.epoch = epoch
            dataset.set_epoch(epoch)
        return iterator

    return wrapper


def refuse_no_batches(given: Mapping[str, Any]) -> None:
    """Raise an error that says why a split has no batches.

    Args:
        given: the arguments of ``get_batch_iterator``.

    Raises:
        UsageError: every sample is too long, or the only batch is left out. If neither is true, the
            function returns.
    """
    dataset, multiple = given["dataset"], given["required_batch_size_multiple"]
    indices = dataset.ordered_indices()
    if given["max_positions"] is not None:
        indices, _ = dataset.filter_indices_by_size(indices, given["max_positions"])
    if not len(indices):
        max_tokens = given["max_tokens"]
        tokens = "" if max_tokens is None else f"--max-tokens {max_tokens} or "
        raise UsageError(
            f"every sample of the data is longer than {tokens}the model's positions "
            "(--max-target-positions, --tokens-per-sample)"
        )
    if multiple > 1:
        raise UsageError(
            f"--required-batch-size-multiple {multiple}: leaves out the only batch, of "
            f"{len(indices)} sentences; give 1 to use all"
        )
