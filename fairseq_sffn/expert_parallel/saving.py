"""Saving a checkpoint from all processes that hold a part of it.

Each process writes its part into a folder. Then rank 0 writes fairseq's file, which names the
folder. fairseq can therefore copy and remove its files as usual. Training removes folders that no
``*.pt`` file beside them names, so a copy with another suffix does not keep its folder.
"""

from __future__ import annotations

import logging
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer

from ..checkpoints.part_files import RESHARDED, TRAINED, folder_named_by
from ..checkpoints.reading import read_file
from ..checkpoints.shared_folder import largest, not_seen, sizes_of, wait_for
from ..errors import UsageError
from ..memory import SparseMemory
from ..memory.sharding import SHARDED, can_be_sharded
from ..models.process_groups import process_groups
from ..options.waiting import peer_timeout
from ..ranks import agreed, gathered
from .gradients import expert_parallel_of
from .parts import Part, save_part, take_parts
from .settings import flattens_parameters

logger = logging.getLogger(__name__)

FAILED = ""
"""Rank 0 broadcasts this in place of a folder if it could not write."""
GRACE_SECONDS = 3600
"""Age below which folders of ``reshard`` are kept, because it may still be writing."""


def part_of(trainer: Trainer) -> Part:
    """Return the part that a trainer's process saves and loads."""
    model = trainer.get_model()
    named = list(chain(model.named_parameters(), trainer.get_criterion().named_parameters()))
    names = [name for name, parameter in named if parameter.requires_grad]
    sharded = tuple(
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, SparseMemory) and can_be_sharded(module.config.selector_class)
        for name in SHARDED
        if getattr(module, name) is not None
    )
    groups = process_groups(expert_parallel_of(model)).groups
    flat = flattens_parameters(trainer.cfg.common)
    return Part(groups.shard, groups.shards, sharded, names, flat=flat)


def save_together(trainer: Trainer, save_dir: Path, save: Callable[[], Any]) -> Any:
    """Save a checkpoint in parts. All processes call it together.

    Args:
        trainer: the trainer, whose ``save_checkpoint`` calls :func:`write_parts` on rank 0.
        save_dir: folder of the checkpoints.
        save: fairseq's function, which saves on rank 0.

    Returns:
        The result of ``save``.

    Raises:
        UsageError: on every rank, if a file could not be written. The rank that failed has already
            printed the reason.
    """
    if not trainer.is_data_parallel_master:
        saved = save()
        while (folder := agreed(None)) is not None:
            if folder == FAILED:
                raise UsageError(1)
            write_part(trainer, Path(folder))
        return saved
    saved, problem = None, None
    try:
        saved = save()
    except PartNotWritten:  # every rank raises it
        raise
    except UsageError as error:
        problem = error
    finally:
        remove_unnamed(save_dir)
    if problem is not None:
        say(str(problem))
        agreed(FAILED)
        raise UsageError(1) from problem
    agreed(None)
    return saved


def say(problem: str) -> None:
    """Print why a checkpoint is not written.

    A launcher ends all processes as soon as one of them has ended. The reason must therefore be
    printed before the other ranks know of the failure.
    """
    print(problem, file=sys.stderr, flush=True)


class PartNotWritten(UsageError):
    """Raised on every rank if a rank could not write its part. That rank has printed the reason."""


def write_parts(trainer: Trainer, folder: Path) -> None:
    """Make all ranks write their parts.

    Rank 0 calls it while the other ranks are in :func:`save_together`.

    Raises:
        PartNotWritten: a rank cannot write its part.
    """
    write_part(trainer, Path(agreed(str(folder))))


def write_part(trainer: Trainer, folder: Path) -> None:
    """Write this process's part, and wait for all ranks.

    A process whose part is a replica of another process's part writes nothing. Rank 0 waits until
    it sees all parts.

    Raises:
        PartNotWritten: on every rank, if a rank cannot write its part, or rank 0 does not see it.
    """
    part, failed, written = part_of(trainer), False, {}
    if dist.get_rank() < part.shards:  # the first ranks together have all blocks
        skipped = trainer.cfg.checkpoint.no_save_optimizer_state
        optimizer_state = None if skipped else trainer.optimizer.state_dict()
        model = trainer.get_model().state_dict()
        state = {"model": model, "last_optimizer_state": optimizer_state}
        try:
            path = save_part(folder, part, take_parts(state, part))
            written = sizes_of([path])
        except UsageError as error:
            say(str(error))
            failed = True
    answers = gathered((failed, written))
    if any(failed for failed, _ in answers):
        raise PartNotWritten(1)
    sizes = [sizes for _, sizes in answers]
    missing = wait_for(largest(sizes), peer_timeout()) if dist.get_rank() == 0 else None
    if (missing := agreed(missing)) is not None:
        writer = next(number for number, files in enumerate(sizes) if missing in files)
        if dist.get_rank() == 0:
            say(not_seen(missing, 0, socket.gethostname(), writer))
        dist.barrier(group=distributed_utils.get_global_group())
        raise PartNotWritten(1)


def remove_unnamed(save_dir: Path) -> None:
    """Remove folders of parts that no ``*.pt`` file beside them names."""
    found = chain(save_dir.glob(f"{TRAINED}*-*"), save_dir.glob(f"{RESHARDED}*-*"))
    folders = {path.name for path in found if _holds_parts(path)}
    if not folders:
        return
    for checkpoint in save_dir.glob("*.pt"):
        try:
            state = read_file(checkpoint, verify=False, mapped=True)
        except UsageError as error:
            logger.warning(f"folders of parts are kept, since one may belong to it: {error}")
            return
        if (folder := folder_named_by(state)) is not None:
            folders.discard(folder)
    for name in folders:
        try:
            if not _may_be_named_soon(save_dir / name):
                shutil.rmtree(save_dir / name)
        except OSError as error:  # for example, NFS keeps files that are open elsewhere
            logger.warning(f"{save_dir / name}: not removed: {error}")


def _holds_parts(folder: Path) -> bool:
    """Return whether a folder has a name of ``new_folder``, and holds only parts or nothing."""
    named = re.fullmatch(rf"({TRAINED}|{RESHARDED}).+-[0-9a-f]{{8}}", folder.name)
    return (
        named is not None
        and folder.is_dir()
        and all(path.name.startswith("part") for path in folder.iterdir())
    )


def _may_be_named_soon(folder: Path) -> bool:
    """Return whether ``reshard`` may still be writing the checkpoint of a folder."""
    age = time.time() - folder.stat().st_mtime
    return folder.name.startswith(RESHARDED) and age < GRACE_SECONDS
