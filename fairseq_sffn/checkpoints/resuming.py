"""The checkpoint that a training goes on from: the newest whole one."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from omegaconf import open_dict

from ..errors import UsageError
from .loading import KEY, read_checkpoint
from .part_files import check_part, part_paths
from .reading import DamagedCheckpoint, read_file

logger = logging.getLogger(__name__)

LAST = "checkpoint_last.pt"
"""What fairseq goes on from, unless ``--restore-file`` names another."""
SAVED = re.compile(r"checkpoint(_last|_best|\d+|_\d+_\d+|\.best_.+)\.pt")
"""Names under which fairseq saves."""


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
def restoring(cfg: Any, checkpoint: Path | None) -> Iterator[None]:
    """A context in which fairseq goes on from a checkpoint as if from ``checkpoint_last.pt``.

    Args:
        cfg: the group ``checkpoint``.
        checkpoint: the file; ``None`` where it is ``checkpoint_last.pt``, or there is none.
    """
    if checkpoint is None:
        yield
        return
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
