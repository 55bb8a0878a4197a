"""Choice of the checkpoint from which training resumes: the newest whole one."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairseq.file_io import PathManager
from omegaconf import open_dict

from ..errors import UsageError
from ..ranks import agreed, gathered, rank, world_size
from .loading import KEY, read_checkpoint
from .part_files import check_part, named_parts, part_paths
from .reading import DamagedCheckpoint, read_file
from .shared_folder import see_together

logger = logging.getLogger(__name__)

LAST = "checkpoint_last.pt"
"""Checkpoint from which fairseq resumes, unless ``--restore-file`` names another."""
SAVED = re.compile(r"checkpoint(_last|_best|\d+|_\d+_\d+|\.best_.+)\.pt")
"""Matches the names under which fairseq saves checkpoints."""


def is_local(cfg: Any) -> bool:
    """Return whether all checkpoints lie in a local file system, not behind a URL."""
    names = (cfg.save_dir, cfg.restore_file, cfg.finetune_from_model)
    return not any(name and PathManager.path_requires_pathmanager(name) for name in names)


def check_named(cfg: Any) -> None:
    """Check the checkpoint that ``--restore-file`` names.

    The function warns if an interrupted training would start over from that checkpoint. All ranks
    call it together.

    Args:
        cfg: the option group ``checkpoint``.

    Raises:
        UsageError: the file does not exist.
    """
    named = cfg.restore_file
    see_together([Path(named)])
    if not os.path.isfile(named):
        raise UsageError(f"--restore-file {named}: there is no such file")
    last = Path(cfg.save_dir or ".", LAST)
    if last.is_file() and not os.path.samefile(last, named):
        logger.warning(
            f"--restore-file {named}: training begins from it, not from {last}, which is there too"
        )


@contextmanager
def restoring(cfg: Any, checkpoint: Path | None) -> Iterator[None]:
    """Return a context in which fairseq resumes from a given file in place of
    ``checkpoint_last.pt``.

    Args:
        cfg: the option group ``checkpoint``.
        checkpoint: the file; ``None``: nothing changes.
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
    """Return the newest whole checkpoint of a folder and its files, the same on every rank.

    All ranks call it together. Each rank compares some of the files with their checksums.

    Returns:
        The checkpoint, ``None`` if the folder has none, and its files.

    Raises:
        UsageError: no checkpoint of the folder is whole, a file is not a checkpoint, or a rank does
            not see a file of another one.
    """
    damaged: list[str] = []
    see_together(saved_in(save_dir), who=[0])
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
    """Return in words why ``checkpoint_last.pt`` is not used."""
    there = (save_dir / LAST).exists()
    return f"{LAST} is older" if there else f"there is no {LAST}"


def candidates(save_dir: Path) -> list[Path]:
    """Return the checkpoints of a folder in the order in which to try them.

    ``checkpoint_last.pt`` is first, except after checkpoints that have more updates and were
    written later. Users go back by copying an older checkpoint over ``checkpoint_last.pt``; the
    copy is then the latest file. The other checkpoints follow by their number of updates.
    """
    updates: dict[Path, int] = {}
    for path in saved_in(save_dir):
        updates[path] = updates_of(path)
    last = save_dir / LAST
    written = {path: path.stat().st_mtime_ns for path in updates}

    def order(path: Path) -> tuple[bool, int, int]:
        is_older = last in updates and (
            updates[path] <= updates[last] or written[path] < written[last]
        )
        return path != last and is_older, -updates[path], -written[path]

    return sorted(updates, key=order)


def saved_in(save_dir: Path) -> list[Path]:
    """Return the files of a folder that have the name of a checkpoint."""
    paths = save_dir.glob("*.pt") if save_dir.is_dir() else ()
    return [path for path in paths if SAVED.fullmatch(path.name)]


def updates_of(path: Path) -> int:
    """Return the number of updates of a checkpoint; -1: it cannot be read."""
    try:
        state = read_file(path, verify=False, mapped=True)
        return int(state["optimizer_history"][-1]["num_updates"])
    except (UsageError, LookupError, TypeError, ValueError):
        return -1


def check_files(checkpoint: Path) -> tuple[list[Path], str | None]:
    """Check the files of a checkpoint. All ranks call it together, and get the same result.

    Returns:
        The files, and the damage in words; ``None``: all files are whole.

    Raises:
        UsageError: on every rank, if a file is not a checkpoint.
    """
    files, saved, error = [checkpoint], {}, None
    if rank() == 0:
        try:
            saved = read_checkpoint(str(checkpoint), mapped=True).get(KEY, {})
        except UsageError as caught:
            error = caught
    saved, error = agreed((saved, error))
    if error is None and "folder" in saved:
        see_together([checkpoint, *named_parts(checkpoint, saved)])
        try:
            files += (parts := part_paths(checkpoint, saved))
            for shard in range(rank(), len(parts), world_size()):
                check_part(read_file(parts[shard], mapped=True), parts[shard], saved, shard)
        except UsageError as caught:
            error = caught
        error = next(filter(None, gathered(error)), None)
    if error is not None and not isinstance(error, DamagedCheckpoint):
        raise error
    return files, None if error is None else str(error)
