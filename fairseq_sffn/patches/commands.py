"""Patches of fairseq's commands: checks before they begin, and the use of all batches.

:mod:`.evaluation` has ``fairseq-eval-lm``. :mod:`.launch` has the processes of all commands.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils

from ..checkpoints.resuming import is_local
from ..checkpoints.shared_folder import check_shared
from ..checkpoints.writing import take_over_asynchronous_writing
from ..errors import UsageError
from ..expert_parallel.settings import check_and_compare_settings
from ..options.checks import check_ranges
from ..options.commands import (
    check_generation,
    check_interaction,
    check_training,
    check_validation,
)
from ..options.configuration import as_configuration, batches_of_any_size
from .registry import MENDS_FAIRSEQ, NEEDED, patch


@patch(
    "fairseq_cli.train:add_defaults",
    why="Ranks with different flags or code train a wrong model. Numbers without a meaning train, "
    "or end in a traceback.",
    until="fairseq compares its ranks, and checks its options.",
    kind=NEEDED,
    written_for=("444f1d62",),
)
def add_defaults(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check the options of training when they are complete.

    The target is not ``train.main``, because ``fairseq-hydra-train`` imports the plugin within it.
    ``train.main`` then calls ``add_defaults``.
    """

    @functools.wraps(original)
    def wrapper(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(cfg, *args, **kwargs)
        check_and_compare_settings(cfg)
        check_ranges(cfg)
        check_training(cfg)
        check_save_directory(cfg)
        check_shared_directory(cfg)
        take_over_asynchronous_writing(cfg.checkpoint)
        return result

    return wrapper


def check_save_directory(cfg: Any) -> None:
    """Check that checkpoints can be written to ``--save-dir``, as fairseq does later.

    Raises:
        UsageError: the directory is not writable.
    """
    if not distributed_utils.is_master(cfg.distributed_training):
        return
    save_dir = cfg.checkpoint.save_dir
    try:
        checkpoint_utils.verify_checkpoint_directory(save_dir)
    except OSError as error:
        line = f"--save-dir {save_dir}: cannot be written to: {error.strerror}"
        raise UsageError(line) from error


def check_shared_directory(cfg: Any) -> None:
    """Check that all hosts see ``--save-dir``. All ranks call it together.

    Raises:
        UsageError: they do not, and sharded blocks need it.
    """
    options = cfg.checkpoint
    if not options.no_save and options.save_dir and is_local(options):
        sharded = getattr(cfg.model, "sffn_expert_parallel", 1) > 1
        check_shared(Path(options.save_dir), needed=sharded)


@patch(
    "fairseq_cli.generate:main",
    why="fairseq-generate leaves out the last batch if its size is not a multiple of 8. Numbers "
    "without a meaning decode, or end in a traceback.",
    until="fairseq translates every sentence, and checks its options.",
    kind=MENDS_FAIRSEQ,
    written_for=("7fe3977d",),
)
def generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check the options of generation, and use the last batch."""

    @functools.wraps(original)
    def wrapper(cfg: Any) -> Any:
        cfg = as_configuration(cfg)
        check_ranges(cfg)
        check_generation(cfg)
        with batches_of_any_size(cfg.dataset):
            return original(cfg)

    return wrapper


@patch(
    "fairseq_cli.interactive:main",
    why="Numbers without a meaning decode, or end in a traceback.",
    until="fairseq checks its options.",
    kind=MENDS_FAIRSEQ,
    written_for=("09227ef1",),
)
def interactive(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check the options of interactive decoding."""

    @functools.wraps(original)
    def wrapper(cfg: Any) -> Any:
        cfg = as_configuration(cfg)
        check_ranges(cfg)
        check_interaction(cfg)
        return original(cfg)

    return wrapper


@patch(
    "fairseq_cli.validate:main",
    why="fairseq-validate leaves out the last batch if its size is not a multiple of 8. It reads "
    "the data folder that a checkpoint names instead of the caller's.",
    until="fairseq validates on every sentence of the caller's folder.",
    kind=MENDS_FAIRSEQ,
    written_for=("02cc88de",),
)
def validate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check the options of validation, use the last batch, and read the caller's data."""

    @functools.wraps(original)
    def wrapper(cfg: Any, override_args: argparse.Namespace | None = None) -> Any:
        cfg = as_configuration(cfg)
        check_ranges(cfg)
        check_validation(cfg)
        if override_args is None and getattr(cfg.task, "data", None) is not None:
            override_args = argparse.Namespace(data=cfg.task.data)
        with batches_of_any_size(cfg.dataset):
            return original(cfg, override_args)

    return wrapper
