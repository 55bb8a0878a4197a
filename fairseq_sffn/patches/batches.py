"""How fairseq's tasks make batches."""

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
    why="fairseq says how many samples it leaves out, but neither of how many nor how long they "
    "are.",
    until="fairseq counts them.",
    kind=MENDS_FAIRSEQ,
    written_for=("4665c28f",),
)
def filter_indices_by_size(original: Callable[..., Any]) -> Callable[..., Any]:
    """Warn of the tokens that are left out."""

    @functools.wraps(original)
    def wrapper(self: FairseqTask, indices: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        kept = original(self, indices, dataset, *args, **kwargs)
        if found := left_out(dataset, kept, indices):
            logger.warning(f"left out: {found}")
        return kept

    return wrapper


@patch(
    "fairseq.tasks:FairseqTask.get_batch_iterator",
    why="A training that resumes in a later epoch deals sentences to other batches than one that "
    "went through; where no batch is left, fairseq ends in a traceback, or trains on nothing for "
    "ever.",
    until="fairseq deals by the first epoch where it keeps batches, and refuses to have none.",
    kind=MENDS_FAIRSEQ,
    written_for=("48e2ec8f",),
)
def get_batch_iterator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Deal sentences by the first epoch wherever batches are kept, and refuse to have none.

    fairseq deals by the seed and by the epoch that a command starts in.
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
        # A caller's own data may be empty, such as a line of fairseq-interactive.
        is_split = any(dataset is split for split in self.datasets.values())
        if is_new:
            given["epoch"] = 1
        try:
            iterator = original(*call.args, **call.kwargs)
            # The trainer, which is the first to ask, asks for the batches at once too.
            is_empty = is_split and getattr(iterator, "frozen_batches", None) == ()
        except IndexError:  # from fairseq, which looks for the last of no batches
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
    """Say why a split has no batches.

    Args:
        given: the arguments of ``get_batch_iterator``.

    Raises:
        UsageError: every sample is too long, or the only batch is left out.
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
