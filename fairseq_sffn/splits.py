"""Checks of the splits that a command reads."""

from __future__ import annotations

import functools
import os
from typing import Any

from fairseq.data import data_utils
from fairseq.file_io import PathManager
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.translation import TranslationTask
from fairseq.utils import split_paths

from .compat import replace_once
from .errors import UsageError, flag, shown

READERS = (LanguageModelingTask, TranslationTask)
"""The tasks whose files are known."""


def apply() -> None:
    """Apply every repair."""
    refuse_data_without_sentences()


def refuse_data_without_sentences() -> None:
    """Where every sentence is left out, as too long or with the last batch, fairseq ends in a
    traceback, trains for ever on nothing, or finds a perplexity of 1. Can go when it says so."""

    @functools.wraps(data_utils.batch_by_size)
    def batch_by_size(
        indices: Any,
        num_tokens_fn: Any,
        num_tokens_vec: Any = None,
        max_tokens: Any = None,
        max_sentences: Any = None,
        required_batch_size_multiple: int = 1,
        fixed_shapes: Any = None,
    ) -> Any:
        if hasattr(indices, "__len__") and not len(indices):
            tokens = "" if max_tokens is None else f"--max-tokens {max_tokens} or "
            raise UsageError(
                f"every sample of the data is longer than {tokens}the model's positions "
                "(--max-target-positions, --tokens-per-sample)"
            )
        batches = original(
            *(indices, num_tokens_fn, num_tokens_vec, max_tokens, max_sentences),
            *(required_batch_size_multiple, fixed_shapes),
        )
        if not len(batches) and required_batch_size_multiple > 1:
            raise UsageError(
                f"--required-batch-size-multiple {required_batch_size_multiple}: leaves out the "
                f"only batch, of {len(indices)} sentences; give 1 to use all"
            )
        return batches

    original = data_utils.batch_by_size
    replace_once(data_utils, "batch_by_size", batch_by_size)


def check_splits(cfg: Any, *options: str) -> None:
    """Raises UsageError where a language modelling or translation task has no data.

    Args:
        options: of the group ``dataset``, those that name splits.
    """
    if not issubclass(TASK_REGISTRY.get(cfg.task._name, object), READERS):
        return
    folders = split_paths(cfg.task.data)
    if any(map(PathManager.path_requires_pathmanager, folders)):
        return
    for folder in folders:
        if not os.path.isdir(folder):
            raise UsageError(f"data {folder}: there is no such folder")
    for option in options:
        for split in cfg.dataset[option].split(","):
            # Each epoch may read a training split of its own folder, all others are in the first.
            for folder in folders if option == "train_subset" else folders[:1]:
                if not split or not has_split(folder, split):
                    names = f"{flag(option)} {shown(cfg.dataset[option])}"
                    raise UsageError(f"{names}: there is no split {shown(split)} in {folder}")


def has_split(folder: str, split: str) -> bool:
    """Whether a folder has files of a split, in any of fairseq's formats."""
    files = os.listdir(folder)
    return any(file == split or file.startswith(f"{split}.") for file in files)
