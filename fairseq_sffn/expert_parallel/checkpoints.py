"""Checkpoints of models whose blocks are shared out.

``checkpoint_X.pt`` is fairseq's file without the sharded parameters and their optimizer state, and
names a folder beside it that has a file for each part. So what fairseq does to files (copy, prune,
keep the best and the last) goes on working, no process ever holds all parts, and a checkpoint
loads at any number of parts. Parts are written first, each under another name until it is whole.
Training removes folders that no ``*.pt`` file beside them names any more; a copy of a checkpoint
under a name that ends otherwise does not keep its folder.

``torch.distributed.checkpoint`` does the same for a state of tensors, but unpickles its metadata,
which could run code, and knows nothing of the files that fairseq copies and removes.
"""

from __future__ import annotations

import functools
import logging
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from omegaconf import open_dict
from torch import Tensor

from ..checkpoints.loading import KEY, fingerprints, is_checked
from ..checkpoints.reading import DamagedCheckpoint, read_file, verify_file
from ..checkpoints.structure import PART, check_structure
from ..compat import replace_once
from ..errors import UsageError
from ..memory import SparseMemory
from ..memory.sparse_memory import SHARDED, can_be_sharded
from ..models.process_groups import process_groups
from .gradients import expert_parallel_of
from .launch import flattens_parameters

logger = logging.getLogger(__name__)

PREFIX = "shards-"
"""Of the folders that training writes."""
RESHARDED = "resharded-"
"""Of those that ``fairseq-sffn reshard`` writes, perhaps where a job trains and removes folders."""
FAILED = ""
"""What rank 0 says in place of a folder where it could not write."""
HOUR = 3600
"""In seconds: longer than it takes to write parts."""


def apply() -> None:
    """Apply all of it."""
    write_parts()
    read_parts()


class Part(NamedTuple):
    """What one process loads.

    Attributes:
        shard, shards: which of how many parts.
        sharded: names of the parameters that can be in parts.
        parameters: names in the order of its optimizer; ``None``: of no importance.
        reset_optimizer: the optimizer's state is not wanted.
        flat: its optimizer sees one tensor with all parameters in it.
    """

    shard: int = 0
    shards: int = 1
    sharded: tuple[str, ...] = ()
    parameters: list[str] | None = None
    reset_optimizer: bool = False
    flat: bool = False

    def of(self, rows: int) -> slice:
        """Its rows of a table of so many."""
        return slice(self.shard * rows // self.shards, (self.shard + 1) * rows // self.shards)


_part: ContextVar[Part | None] = ContextVar("part", default=None)


def part_of(trainer: Trainer) -> Part:
    """What a trainer's process saves and loads."""
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


# Writing.


def write_parts() -> None:
    """Every process that holds a part writes it when rank 0 writes a checkpoint; and every
    checkpoint tells the names of its parameters."""

    @functools.wraps(checkpoint_utils.save_checkpoint)
    def save_checkpoint(cfg: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if cfg.no_save or expert_parallel_of(trainer.get_model()) == 1:
            saved = original(cfg, trainer, *args, **kwargs)
            if cfg.save_dir and not cfg.no_save and trainer.is_data_parallel_master:
                remove_unnamed(Path(cfg.save_dir))  # which training in parts has left
            return saved
        trainer.sffn_together, saved = True, None
        try:
            saved = original(cfg, trainer, *args, **kwargs)  # on rank 0, where it saves
        except UsageError as error:
            if trainer.is_data_parallel_master and not isinstance(error, PartNotWritten):
                _tell(FAILED)
            raise
        finally:
            trainer.sffn_together = False
            if trainer.is_data_parallel_master:
                remove_unnamed(Path(cfg.save_dir))
        if trainer.is_data_parallel_master:
            _tell(None)
            return saved
        while (folder := _tell(None)) is not None:
            if folder == FAILED:
                raise SystemExit(1)  # rank 0 says why
            write_part(trainer, Path(folder))
        return saved

    @functools.wraps(Trainer.save_checkpoint)
    def save_of_trainer(self: Trainer, filename: str, extra_state: Any) -> Any:
        if expert_parallel_of(self.get_model()) == 1:
            return original_of_trainer(self, filename, extra_state)
        if not getattr(self, "sffn_together", False):
            # fairseq saves on the rank that fails, while the others wait for its part of theirs.
            logger.warning(f"{filename}: not written, since this rank has its own blocks only")
            return None
        self.sffn_folder = new_folder(filename, f"{PREFIX}{self.get_num_updates()}")
        write_part(self, Path(_tell(str(self.sffn_folder))))
        return original_of_trainer(self, filename, extra_state)

    @functools.wraps(Trainer.state_dict)
    def state_dict(self: Trainer) -> dict[str, Any]:
        state = original_state(self)
        if self.is_fsdp:  # whose parameters are pieces of several
            return state
        part = part_of(self)
        state[KEY] = {"parameters": part.parameters, "sharded": list(part.sharded)}
        if part.shards > 1:
            state[KEY] |= {"folder": self.sffn_folder.name, "shards": part.shards}
            take_parts(state, part)
        state[KEY] |= fingerprints(state["model"], in_parts=part.shards > 1)
        return state

    original = checkpoint_utils.save_checkpoint
    original_of_trainer, original_state = Trainer.save_checkpoint, Trainer.state_dict
    replace_once(checkpoint_utils, "save_checkpoint", save_checkpoint)
    replace_once(Trainer, "save_checkpoint", save_of_trainer)
    replace_once(Trainer, "state_dict", state_dict)


def _tell(folder: str | None) -> Any:
    """What rank 0 says, on every rank: the folder to write parts to, or that there is no more."""
    said = [folder]
    dist.broadcast_object_list(said, src=0, group=distributed_utils.get_global_group())
    return said[0]


def write_part(trainer: Trainer, folder: Path) -> None:
    """Writes this process's part, unless it is a replica of another's, and waits for all.

    Raises:
        PartNotWritten: on every rank, where some rank cannot write its own.
    """
    part, problem = part_of(trainer), None
    if dist.get_rank() < part.shards:  # the first group that shares blocks out
        model = trainer.get_model().state_dict()
        state = {"model": model, "last_optimizer_state": _optimizer_state(trainer)}
        try:
            save_part(folder, part, take_parts(state, part))
        except UsageError as error:
            problem = str(error)
    group = distributed_utils.get_global_group()
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    if said := next(filter(None, problems), None):
        # The first that failed says why.
        raise PartNotWritten(said if dist.get_rank() == problems.index(said) else 1)


class PartNotWritten(UsageError):
    """Some rank could not write its part, which every rank knows."""


def _optimizer_state(trainer: Trainer) -> Any:
    skipped = trainer.cfg.checkpoint.no_save_optimizer_state
    return None if skipped else trainer.optimizer.state_dict()


def take_parts(state: dict[str, Any], part: Part) -> dict[str, Any]:
    """Takes the sharded parameters, and their optimizer state by name, out of a checkpoint."""
    model = {name: state["model"].pop(name).cpu() for name in part.sharded}
    taken: dict[str, Any] = {"model": model, "optimizer": {}}
    if optimizer := state.get("last_optimizer_state"):
        assert part.parameters is not None
        kept = dict(optimizer["state"])
        for name in part.sharded:
            own = kept.pop(part.parameters.index(name), {})
            taken["optimizer"][name] = {
                k: v.cpu() if torch.is_tensor(v) else v for k, v in own.items()
            }
        state["last_optimizer_state"] = {**optimizer, "state": kept}
    return taken


def new_folder(checkpoint: str | Path, name: str) -> Path:
    """A folder for a checkpoint's parts that no other has, beside it."""
    return Path(checkpoint).parent / f"{name}-{secrets.token_hex(4)}"


def save_part(folder: Path, part: Part, taken: dict[str, Any]) -> None:
    """Writes one part, atomically.

    Raises:
        UsageError: it cannot be written.
    """
    path = part_path(folder, part.shard, part.shards)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"checkpoint {path}: not written: {error.strerror}") from error
    state = {**taken, **identity_of_part(folder.name, part.shard, part.shards)}
    checkpoint_utils.torch_persistent_save(state, str(path))


def identity_of_part(folder: str, shard: int, shards: int) -> dict[str, Any]:
    """What a part says of itself, so that no other is taken for it."""
    return {"folder": folder, "shard": shard, "shards": shards}


def part_path(folder: Path, shard: int, shards: int) -> Path:
    """Where a part is."""
    return folder / f"part{shard + 1}-of-{shards}.pt"


def remove_unnamed(save_dir: Path) -> None:
    """Removes folders of parts that no ``*.pt`` file beside them names."""
    found = chain(save_dir.glob(f"{PREFIX}*-*"), save_dir.glob(f"{RESHARDED}*-*"))
    folders = {path.name for path in found if _is_of_parts(path)}
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
        except OSError as error:  # such as files that NFS keeps while they are open somewhere
            logger.warning(f"{save_dir / name}: not removed: {error}")


def folder_named_by(state: Any) -> str | None:
    """The folder that what a file holds names, if it is a checkpoint in parts."""
    saved = state.get(KEY) if isinstance(state, dict) else None
    return saved.get("folder") if isinstance(saved, dict) else None


def _is_of_parts(folder: Path) -> bool:
    """Whether it has a name of ``new_folder``, and holds parts or nothing."""
    named = re.fullmatch(rf"({PREFIX}|{RESHARDED}).+-[0-9a-f]{{8}}", folder.name)
    return (
        named is not None
        and folder.is_dir()
        and all(path.name.startswith("part") for path in folder.iterdir())
    )


def _may_be_named_soon(folder: Path) -> bool:
    """Whether ``reshard`` may still be writing the checkpoint."""
    return folder.name.startswith(RESHARDED) and time.time() - folder.stat().st_mtime < HOUR


# Reading.


def read_parts() -> None:
    """A checkpoint is read with what a process needs of its parts: its own in training, all to use
    a model; and of a checkpoint in one piece, its part."""

    @functools.wraps(checkpoint_utils.load_checkpoint_to_cpu)
    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        state = original(path, *args, **kwargs)
        put_parts(state, Path(PathManager.get_local_path(path)), _part.get() or Part())
        return state

    @functools.wraps(Trainer.load_checkpoint)
    def load_checkpoint(
        self: Trainer, filename: str, reset_optimizer: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if self.is_fsdp:
            return original_of_trainer(self, filename, reset_optimizer, *args, **kwargs)
        part = part_of(self)._replace(reset_optimizer=reset_optimizer)
        in_parts = part.shards > 1 or _is_in_parts(filename)
        with _loading(part), _on_all_ranks(self.cfg.checkpoint, in_parts):
            return original_of_trainer(self, filename, reset_optimizer, *args, **kwargs)

    original = checkpoint_utils.load_checkpoint_to_cpu
    original_of_trainer = Trainer.load_checkpoint
    replace_once(checkpoint_utils, "load_checkpoint_to_cpu", load_checkpoint_to_cpu)
    replace_once(Trainer, "load_checkpoint", load_checkpoint)


def _is_in_parts(filename: str) -> bool:
    if not PathManager.isfile(filename):
        return False
    local = PathManager.get_local_path(filename)
    return folder_named_by(read_file(local, verify=False, mapped=True)) is not None


@contextmanager
def _loading(part: Part) -> Iterator[None]:
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


@contextmanager
def _on_all_ranks(cfg: Any, wanted: bool) -> Iterator[None]:
    """Every rank reads the checkpoint, in place of rank 0 that sends it."""
    before = cfg.load_checkpoint_on_all_dp_ranks
    with open_dict(cfg):
        cfg.load_checkpoint_on_all_dp_ranks = before or wanted
    try:
        yield
    finally:
        with open_dict(cfg):
            cfg.load_checkpoint_on_all_dp_ranks = before


def put_parts(state: dict[str, Any], path: Path, part: Part) -> None:
    """Completes a checkpoint by what a process needs of the sharded parameters, in place.

    Args:
        path: of the checkpoint.

    Raises:
        UsageError: a part is missing, damaged or another's, or the optimizer's state cannot be cut.
    """
    if part.reset_optimizer:
        state["last_optimizer_state"] = None
    saved, optimizer = state.get(KEY, {}), state.get("last_optimizer_state")
    if "folder" in saved:
        if part.flat and optimizer:
            raise UsageError(
                f"checkpoint {path}: its optimizer's state is in parts, and --fp16 without "
                "--fp16-no-flatten-grads wants one piece; add that, or --reset-optimizer"
            )
        own = _join_parts(open_parts(path, saved), saved["sharded"], part)
    elif part.shards > 1:
        own = cut_part(state, path, part)
    else:
        own = {"model": {}, "optimizer": {}}
    state["model"] |= own["model"]
    if optimizer and "state" in optimizer:  # not of several optimizers, which are not shared out
        names = saved.get("parameters") or part.parameters or []
        optimizer["state"] |= {names.index(name): of for name, of in own["optimizer"].items()}
        _reorder(optimizer, names, part.parameters)


def _reorder(optimizer: dict[str, Any], saved: list[str], own: list[str] | None) -> None:
    """The state goes by name, not by position."""
    if own and own != saved and sorted(own) == sorted(saved):
        optimizer["state"] = {own.index(saved[i]): of for i, of in optimizer["state"].items()}


def cut_part(state: dict[str, Any], path: Path, part: Part) -> dict[str, Any]:
    """A part of a checkpoint that is in one piece.

    Raises:
        UsageError: the optimizer's state cannot be cut.
    """
    # What is not there is another model's checkpoint, which fairseq refuses.
    tables = {name: state["model"][name] for name in part.sharded if name in state["model"]}
    result: dict[str, Any] = {"model": {}, "optimizer": {}}
    if optimizer := state.get("last_optimizer_state"):
        names = state.get(KEY, {}).get("parameters") or part.parameters
        if len(optimizer["param_groups"][0]["params"]) != len(names):
            raise UsageError(
                f"checkpoint {path}: its optimizer's state is in one piece (--fp16 without "
                "--fp16-no-flatten-grads) and cannot be shared out; add --reset-optimizer"
            )
        for name, table in tables.items():
            if (of := optimizer["state"].get(names.index(name))) is not None:
                result["optimizer"][name] = _cut([of], [table], part)
    result["model"] = {name: _rows([table], part) for name, table in tables.items()}
    return result


def _join_parts(parts: dict[Path, dict[str, Any]], names: list[str], part: Part) -> dict[str, Any]:
    """A process's part, from parts that may be others. Only files of which it uses rows are read,
    and compared with their checksums."""
    result: dict[str, Any] = {"model": {}, "optimizer": {}}
    for path in _used(parts, names, part):
        if not is_checked(path):
            with open(path, "rb") as file:
                verify_file(path, file)
    for name in names:
        tables = [saved["model"][name] for saved in parts.values()]
        result["model"][name] = _rows(tables, part)
        states = [saved["optimizer"][name] for saved in parts.values() if saved["optimizer"]]
        if states and not part.reset_optimizer:
            result["optimizer"][name] = _cut(states, tables, part)
    return result


def _used(parts: dict[Path, dict[str, Any]], names: list[str], part: Part) -> list[Path]:
    """The files that have rows of a process's part."""
    used = set()
    for name in names:
        start, wanted = 0, part.of(sum(len(saved["model"][name]) for saved in parts.values()))
        for path, saved in parts.items():
            stop = start + len(saved["model"][name])
            if start < wanted.stop and wanted.start < stop:
                used.add(path)
            start = stop
    return [path for path in parts if path in used]


def part_paths(path: Path, saved: dict[str, Any]) -> list[Path]:
    """The files of a checkpoint's parts.

    Args:
        path: of the checkpoint. A link to it lies elsewhere than its parts.
        saved: what the checkpoint says of its parts.

    Raises:
        DamagedCheckpoint: one is missing.
    """
    folder, shards = path.resolve().parent / saved["folder"], saved["shards"]
    paths = [part_path(folder, shard, shards) for shard in range(shards)]
    for part in paths:
        if not part.is_file():
            raise DamagedCheckpoint(f"checkpoint {path}: its part {part} is missing")
    return paths


def open_parts(path: Path, saved: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """All parts, mapped: only what is used is read.

    Raises:
        UsageError: one is missing, damaged or another's.
    """
    parts = {}
    for shard, part in enumerate(part_paths(path, saved)):
        parts[part] = read_file(part, verify=False, mapped=True)
        check_part(parts[part], part, saved, shard)
    return parts


def check_part(part: Any, path: Path, saved: dict[str, Any], shard: int) -> None:
    """Raises UsageError where a file is not the part whose place it has.

    Args:
        saved: what the checkpoint says of its parts.
    """
    expected = identity_of_part(saved["folder"], shard, saved["shards"])
    check_structure(part, str(path), PART)
    if {key: part[key] for key in expected} != expected:
        raise UsageError(
            f"{path}: not the part of this name, but {part['folder']}'s "
            f"{part['shard'] + 1} of {part['shards']}"
        )
    names = set(saved["sharded"])
    if part["model"].keys() != names or (part["optimizer"] and part["optimizer"].keys() != names):
        raise UsageError(f"{path}: not of the parameters that its checkpoint has in parts")


def _rows(tables: list[Tensor], part: Part) -> Tensor:
    """A process's rows of a table that is in pieces."""
    wanted = part.of(sum(map(len, tables)))
    pieces, start = [], 0
    for table in tables:
        low, high = max(wanted.start - start, 0), min(wanted.stop - start, len(table))
        if low < high:
            pieces.append(table[low:high])
        start += len(table)
    return torch.cat(pieces)


def _cut(states: list[dict[str, Any]], tables: list[Tensor], part: Part) -> dict[str, Any]:
    """The optimizer's state of a process's rows: what has the table's shape is cut as it is."""

    def is_cut(key: str) -> bool:
        return all(
            torch.is_tensor(of[key]) and of[key].shape == table.shape
            for of, table in zip(states, tables, strict=True)
        )

    def own(value: Any) -> Any:
        # No tensor goes on mapping a file that training may remove.
        return value.clone() if torch.is_tensor(value) else value

    return {
        key: _rows([of[key] for of in states], part) if is_cut(key) else own(value)
        for key, value in states[0].items()
    }
