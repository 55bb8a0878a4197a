"""Check that the data splits of a command exist."""

from __future__ import annotations

import os
from typing import Any

from fairseq.file_io import PathManager
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.translation import TranslationTask
from fairseq.utils import split_paths

from ..errors import UsageError, flag, shown
from .checks import is_known

READERS = (LanguageModelingTask, TranslationTask)
"""Tasks whose file names are known."""


def check_splits(cfg: Any, *options: str) -> None:
    """Check that a language modelling or translation task has its data.

    Tasks of other plugins may read other files, and are not checked.

    Args:
        cfg: the whole configuration.
        options: the options in the group ``dataset`` that name splits.

    Raises:
        UsageError: a folder or a split does not exist.
    """
    task = TASK_REGISTRY.get(cfg.task._name, object)
    if not (issubclass(task, READERS) and is_known(task)):
        return
    folders = split_paths(cfg.task.data)
    if any(map(PathManager.path_requires_pathmanager, folders)):
        return
    for folder in folders:
        if not os.path.isdir(folder):
            raise UsageError(f"data {folder}: there is no such folder")
    for option in options:
        for split in cfg.dataset[option].split(","):
            # Each epoch may read another folder for training. Other splits are in the first.
            for folder in folders if option == "train_subset" else folders[:1]:
                if not split or not has_split(folder, split):
                    names = f"{flag(option)} {shown(cfg.dataset[option])}"
                    raise UsageError(f"{names}: there is no split {shown(split)} in {folder}")


def has_split(folder: str, split: str) -> bool:
    """Return whether a folder has files of a split, in any of fairseq's formats."""
    files = os.listdir(folder)
    return any(file == split or file.startswith(f"{split}.") for file in files)
