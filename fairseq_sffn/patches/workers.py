"""Worker processes that load data for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.data.iterators import EpochBatchIterator
from torch.utils.data import get_worker_info

from .signals import survive_signals_of_others


class Collate:
    """Collate function that makes its worker survive signals to the process group.

    Such a signal would end the workers, and the update that waits for them would fail. fairseq has
    no option for a ``worker_init_fn``. The first call in a worker therefore takes its place.

    Args:
        collate: function that merges samples to a mini-batch.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate
        self._is_safe = False

    def __call__(self, samples: Any) -> Any:
        worker = get_worker_info()
        if worker is not None and not self._is_safe:
            survive_signals_of_others(worker.id)
            self._is_safe = True
        return self._collate(samples)


def keep_workers(iterator: Any) -> Any:
    """Make the workers of an iterator survive signals to the process group, and return it."""
    if isinstance(iterator, EpochBatchIterator) and not isinstance(iterator.collate_fn, Collate):
        iterator.collate_fn = Collate(iterator.collate_fn)
    return iterator
