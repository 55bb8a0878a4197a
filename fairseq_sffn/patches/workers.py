"""Processes that load data for a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.data.iterators import EpochBatchIterator
from torch.utils.data import get_worker_info

from .signals import survive_signals_of_others


class Collate:
    """Merges samples to a mini-batch, in workers that survive signals of others.

    A signal to a group of processes would end the workers that load data, and the update that waits
    for them would fail. fairseq has no option for a ``worker_init_fn``, so that the first call in a
    worker takes its place.

    Args:
        collate: merges the samples.
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
    """Let workers that load data survive signals to a group of processes; return the iterator."""
    if isinstance(iterator, EpochBatchIterator) and not isinstance(iterator.collate_fn, Collate):
        iterator.collate_fn = Collate(iterator.collate_fn)
    return iterator
