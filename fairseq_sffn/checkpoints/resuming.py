"""The checkpoint that a training goes on from: the newest whole one."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from fairseq_cli import train as train_command
from omegaconf import open_dict

from ..compat import replace_once
from ..errors import UsageError
from ..expert_parallel.checkpoints import check_part, part_paths
from .loading import KEY, already_checked, read_checkpoint
from .reading import DamagedCheckpoint, read_file

logger = logging.getLogger(__name__)

LAST = "checkpoint_last.pt"
"""What fairseq goes on from, unless ``--restore-file`` names another."""
EARLY_STOPPING = "early_stopping"
"""Entry of a checkpoint's extra state for what ``--patience`` counts."""
SAVED = re.compile(r"checkpoint(_last|_best|\d+|_\d+_\d+|\.best_.+)\.pt")
"""Names under which fairseq saves."""


def apply() -> None:
    """Apply every patch."""
    go_on_from_the_newest()
    begin_without_another_training()
    remember_early_stopping()
    go_on_without_optimizer_state()


def go_on_from_the_newest() -> None:
    """fairseq goes on from ``checkpoint_last.pt`` or, where that was not written, from the start,
    without a word; and from the start too where ``--restore-file`` names no file. Goes on from the
    newest whole checkpoint in the directory, says so, and refuses what is not there. Can go when
    fairseq does."""

    @functools.wraps(checkpoint_utils.load_checkpoint)
    def load_checkpoint(cfg: Any, trainer: Trainer, **kwargs: Any) -> Any:
        if trainer.checkpoint_suffix or not cfg.save_dir or not is_local(cfg):
            return original(cfg, trainer, **kwargs)
        if cfg.finetune_from_model and not os.path.isfile(cfg.finetune_from_model):
            raise UsageError(
                f"--finetune-from-model {cfg.finetune_from_model}: there is no such file"
            )
        if cfg.restore_file != LAST:
            check_named(cfg)
            return original(cfg, trainer, **kwargs)
        newest, files = choose_together(Path(cfg.save_dir))
        if newest is None or newest.name == LAST:
            with already_checked(files):
                return original(cfg, trainer, **kwargs)
        with restoring(cfg, newest), already_checked(files):
            return original(cfg, trainer, **kwargs)

    original = checkpoint_utils.load_checkpoint
    replace_once(checkpoint_utils, "load_checkpoint", load_checkpoint)


def begin_without_another_training() -> None:
    """fairseq keeps the best loss in attributes of two functions, so that the next training in the
    process takes it for its own. Removes them. Can go when a trainer has them."""

    @functools.wraps(train_command.add_defaults)
    def add_defaults(cfg: Any) -> None:
        for function in (train_command.should_stop_early, checkpoint_utils.save_checkpoint):
            for name in ("best", "num_runs"):
                vars(function).pop(name, None)
        original(cfg)

    original = train_command.add_defaults
    replace_once(train_command, "add_defaults", add_defaults)


def remember_early_stopping() -> None:
    """fairseq begins to count ``--patience`` anew when it resumes. Stores the count and the best
    loss. Can go when fairseq does."""

    @functools.wraps(Trainer.save_checkpoint)
    def save_checkpoint(self: Trainer, filename: str, extra_state: dict[str, Any]) -> Any:
        known = vars(train_command.should_stop_early)
        if counted := {name: known[name] for name in ("best", "num_runs") if name in known}:
            extra_state = {**extra_state, EARLY_STOPPING: counted}
        return original_save(self, filename, extra_state)

    @functools.wraps(Trainer.load_checkpoint)
    def load_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        extra_state = original_load(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        if extra_state is not None and not call.arguments.get("reset_meters"):
            for name, value in extra_state.get(EARLY_STOPPING, {}).items():
                setattr(train_command.should_stop_early, name, value)
        return extra_state

    original_save, original_load = Trainer.save_checkpoint, Trainer.load_checkpoint
    signature = inspect.signature(original_load)
    replace_once(Trainer, "save_checkpoint", save_checkpoint)
    replace_once(Trainer, "load_checkpoint", load_checkpoint)


def go_on_without_optimizer_state() -> None:
    """fairseq begins at update 0 where a checkpoint has no optimizer state
    (``--no-save-optimizer-state``), and so trains a finished training again. Goes on at its update
    and in its schedule. Can go when fairseq does."""

    @functools.wraps(Trainer.load_checkpoint)
    def load_checkpoint(self: Trainer, filename: str, *args: Any, **kwargs: Any) -> Any:
        extra_state = original(self, filename, *args, **kwargs)
        call = signature.bind(self, filename, *args, **kwargs).arguments
        if extra_state is None or call.get("reset_optimizer") or self.get_num_updates():
            return extra_state
        last = self._optim_history[-1]
        if not (updates := last["num_updates"]):
            return extra_state
        if not call.get("reset_lr_scheduler"):
            self.lr_scheduler.load_state_dict(last["lr_scheduler_state"])
        self.set_num_updates(updates)
        logger.warning(
            f"{filename}: has no optimizer state; training goes on at update {updates}, and the "
            "optimizer begins anew (--reset-optimizer begins at update 0)"
        )
        return extra_state

    original = Trainer.load_checkpoint
    signature = inspect.signature(original)
    replace_once(Trainer, "load_checkpoint", load_checkpoint)


def is_local(cfg: Any) -> bool:
    """Return whether checkpoints lie in a folder of a file system."""
    names = (cfg.save_dir, cfg.restore_file, cfg.finetune_from_model)
    return not any(name and PathManager.path_requires_pathmanager(name) for name in names)


def check_named(cfg: Any) -> None:
    """Raise UsageError where ``--restore-file`` names no file, and warn where a training that was
    interrupted would begin anew."""
    named = cfg.restore_file
    if not os.path.isfile(named):
        raise UsageError(f"--restore-file {named}: there is no such file")
    last = Path(cfg.save_dir or ".", LAST)
    if last.is_file() and not os.path.samefile(last, named):
        logger.warning(
            f"--restore-file {named}: training begins from it, not from {last}, which is there too"
        )


@contextmanager
def restoring(cfg: Any, checkpoint: Path) -> Iterator[None]:
    """A context in which fairseq goes on from a checkpoint as if from ``checkpoint_last.pt``."""
    before = {name: cfg[name] for name in ("restore_file", "finetune_from_model")}
    with open_dict(cfg):
        cfg.restore_file, cfg.finetune_from_model = str(checkpoint), None
    try:
        yield
    finally:
        with open_dict(cfg):
            cfg.update(before)


def choose_together(save_dir: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest whole checkpoint of a folder, the same on every rank, and its files.

    Each rank compares some of the files of a checkpoint with their checksums.

    Raises:
        UsageError: checkpoints are there, but none is whole, or one holds something else.
    """
    damaged: list[str] = []
    for checkpoint in agreed(candidates(save_dir) if rank() == 0 else []):
        files, problem = check_files(checkpoint)
        if problem is None:
            if checkpoint.name != LAST and rank() == 0:
                logger.warning(
                    f"training goes on from {checkpoint}, the newest whole checkpoint in "
                    f"{save_dir}; {damaged[0] if damaged else reason_of(save_dir)}; "
                    "--restore-file takes another"
                )
            return checkpoint, files
        damaged.append(problem)
        if rank() == 0:
            logger.warning(problem)
    if damaged:
        raise UsageError(f"{damaged[0]}; there is no whole checkpoint in --save-dir {save_dir}")
    return None, []


def reason_of(save_dir: Path) -> str:
    """Return, in words, why ``checkpoint_last.pt`` is passed over."""
    there = (save_dir / LAST).exists()
    return f"{LAST} is older" if there else f"there is no {LAST}"


def rank() -> int:
    """Return the number of this process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agreed(value: Any) -> Any:
    """Return what rank 0 has."""
    if world_size() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0, group=distributed_utils.get_global_group())
    return said[0]


def candidates(save_dir: Path) -> list[Path]:
    """Return the checkpoints of a folder to go on from, the first one first.

    That is ``checkpoint_last.pt``, unless another has made more updates and was written later: a
    copy of an older checkpoint over ``checkpoint_last.pt``, by which people go back, is later. The
    others follow by their updates.
    """
    updates: dict[Path, int] = {}
    for path in save_dir.glob("*.pt") if save_dir.is_dir() else ():
        if SAVED.fullmatch(path.name):
            updates[path] = updates_of(path)
    last = save_dir / LAST
    written = {path: path.stat().st_mtime_ns for path in updates}

    def order(path: Path) -> tuple[bool, int, int]:
        is_older = last in updates and (
            updates[path] <= updates[last] or written[path] < written[last]
        )
        return path != last and is_older, -updates[path], -written[path]

    return sorted(updates, key=order)


def updates_of(path: Path) -> int:
    """Return the updates that a checkpoint has made; -1 where it cannot be read."""
    try:
        state = read_file(path, verify=False, mapped=True)
        return int(state["optimizer_history"][-1]["num_updates"])
    except (UsageError, LookupError, TypeError, ValueError):
        return -1


def check_files(checkpoint: Path) -> tuple[list[Path], str | None]:
    """Return the files of a checkpoint, and which of them is damaged, in words; ``None``: all are
    whole. Every rank gets the same.

    Raises:
        UsageError: on every rank, a file holds something else than a checkpoint.
    """
    files, saved, error = [checkpoint], {}, None
    if rank() == 0:
        try:
            saved = read_checkpoint(str(checkpoint), mapped=True).get(KEY, {})
        except UsageError as caught:
            error = caught
    saved, error = agreed((saved, error))
    if error is None and "folder" in saved:
        try:
            files += (parts := part_paths(checkpoint, saved))
            for shard in range(rank(), len(parts), world_size()):
                check_part(read_file(parts[shard], mapped=True), parts[shard], saved, shard)
        except UsageError as caught:
            error = caught
        errors: list[UsageError | None] = [error]
        if world_size() > 1:
            errors *= world_size()
            group = distributed_utils.get_global_group()
            dist.all_gather_object(errors, error, group=group)
        error = next(filter(None, errors), None)
    if error is not None and not isinstance(error, DamagedCheckpoint):
        raise error
    return files, None if error is None else str(error)
