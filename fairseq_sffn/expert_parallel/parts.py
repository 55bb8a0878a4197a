"""The part of a checkpoint that one process holds: cut it, join it, write it.

No process ever holds all parts. A checkpoint loads at any number of parts.
:mod:`..checkpoints.part_files` describes the files.

``torch.distributed.checkpoint`` also shards tensors. But it unpickles its metadata, which could run
code, and it does not handle the files that fairseq copies and removes.
"""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.loading import KEY
from ..checkpoints.part_files import identity_of_part, open_parts, part_path
from ..checkpoints.reading import verify_file
from ..checkpoints.writing import write_checkpoint
from ..errors import UsageError


class Part(NamedTuple):
    """The part of a checkpoint that one process loads and saves.

    Attributes:
        shard, shards: number of the part, from 0, and number of parts.
        sharded: names of the parameters that can be sharded.
        parameters: names of the parameters in the optimizer's order; ``None``: not needed.
        reset_optimizer: whether to ignore the optimizer's state.
        flat: whether the optimizer has one tensor with all parameters.
    """

    shard: int = 0
    shards: int = 1
    sharded: tuple[str, ...] = ()
    parameters: list[str] | None = None
    reset_optimizer: bool = False
    flat: bool = False

    def of(self, rows: int) -> slice:
        """Return the part's rows of a table with ``rows`` rows."""
        return slice(self.shard * rows // self.shards, (self.shard + 1) * rows // self.shards)


def take_parts(state: dict[str, Any], part: Part) -> dict[str, Any]:
    """Remove the sharded parameters and their optimizer state from a checkpoint, in place.

    Returns:
        ``model``: name -> parameter; ``optimizer``: name -> optimizer state. All tensors are on the
        CPU.
    """
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


def save_part(folder: Path, part: Part, taken: dict[str, Any]) -> Path:
    """Write one part, whole or not at all.

    Args:
        folder: the folder of all parts.
        part: the part.
        taken: the result of :func:`take_parts` or :func:`cut_part`.

    Returns:
        The file.

    Raises:
        UsageError: the file cannot be written.
    """
    path = part_path(folder, part.shard, part.shards)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"checkpoint {path}: not written: {error.strerror}") from error
    state = {**taken, **identity_of_part(folder.name, part.shard, part.shards)}
    write_checkpoint(state, str(path))
    return path


def put_parts(
    state: dict[str, Any], path: Path, part: Part, verified: Set[str] = frozenset()
) -> None:
    """Add a process's rows of the sharded parameters to a checkpoint, in place.

    Args:
        state: the checkpoint.
        path: the file of the checkpoint.
        part: the process's part.
        verified: real paths of files whose checksums were already compared.

    Raises:
        UsageError: a part is missing or damaged, a part belongs to another checkpoint, or the
            optimizer's state cannot be cut.
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
        own = _join_parts(open_parts(path, saved), saved["sharded"], part, verified)
    elif part.shards > 1:
        own = cut_part(state, path, part)
    else:
        own = {"model": {}, "optimizer": {}}
    state["model"] |= own["model"]
    if optimizer and "state" in optimizer:  # a composite optimizer has none, and is not sharded
        names = saved.get("parameters") or part.parameters or []
        optimizer["state"] |= {names.index(name): of for name, of in own["optimizer"].items()}
        _reorder(optimizer, names, part.parameters)


def _reorder(optimizer: dict[str, Any], saved: list[str], own: list[str] | None) -> None:
    """Reorder the optimizer's state by name, because positions may differ."""
    if own and own != saved and sorted(own) == sorted(saved):
        optimizer["state"] = {own.index(saved[i]): of for i, of in optimizer["state"].items()}


def cut_part(state: dict[str, Any], path: Path, part: Part) -> dict[str, Any]:
    """Cut a part from a checkpoint that is not sharded.

    Args:
        state: the checkpoint.
        path: the file of the checkpoint, for messages.
        part: the part.

    Returns:
        ``model``: name -> parameter; ``optimizer``: name -> optimizer state.

    Raises:
        UsageError: the optimizer's state cannot be cut.
    """
    # A missing name means a checkpoint of a different model, which fairseq reports later.
    tables = {name: state["model"][name] for name in part.sharded if name in state["model"]}
    result: dict[str, Any] = {"model": {}, "optimizer": {}}
    if optimizer := state.get("last_optimizer_state"):
        names = state.get(KEY, {}).get("parameters") or part.parameters or []
        if len(optimizer["param_groups"][0]["params"]) != len(names):
            raise UsageError(
                f"checkpoint {path}: its optimizer's state is in one piece (--fp16 without "
                "--fp16-no-flatten-grads) and cannot be sharded; add --reset-optimizer"
            )
        for name, table in tables.items():
            if (of := optimizer["state"].get(names.index(name))) is not None:
                result["optimizer"][name] = _cut([of], [table], part)
    result["model"] = {name: _rows([table], part) for name, table in tables.items()}
    return result


def _join_parts(
    parts: dict[Path, dict[str, Any]], names: list[str], part: Part, verified: Set[str]
) -> dict[str, Any]:
    """Return a process's part from parts that may have other boundaries.

    Only files with rows of the part are read and compared with their checksums.
    """
    result: dict[str, Any] = {"model": {}, "optimizer": {}}
    for path in _used(parts, names, part):
        if os.path.realpath(path) not in verified:
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
    """Return the files that hold rows of a process's part."""
    used = set()
    for name in names:
        start, wanted = 0, part.of(sum(len(saved["model"][name]) for saved in parts.values()))
        for path, saved in parts.items():
            stop = start + len(saved["model"][name])
            if start < wanted.stop and wanted.start < stop:
                used.add(path)
            start = stop
    return [path for path in parts if path in used]


def _rows(tables: list[Tensor], part: Part) -> Tensor:
    """Return a process's rows of a table, given the pieces of the table."""
    wanted = part.of(sum(map(len, tables)))
    pieces, start = [], 0
    for table in tables:
        low, high = max(wanted.start - start, 0), min(wanted.stop - start, len(table))
        if low < high:
            pieces.append(table[low:high])
        start += len(table)
    return torch.cat(pieces)


def _cut(states: list[dict[str, Any]], tables: list[Tensor], part: Part) -> dict[str, Any]:
    """Return the optimizer's state of a process's rows.

    State with the shape of the table is cut like the table.
    """

    def is_cut(key: str) -> bool:
        return all(
            torch.is_tensor(of[key]) and of[key].shape == table.shape
            for of, table in zip(states, tables, strict=True)
        )

    def own(value: Any) -> Any:
        # A clone does not map the file, which training may remove.
        return value.clone() if torch.is_tensor(value) else value

    return {
        key: _rows([of[key] for of in states], part) if is_cut(key) else own(value)
        for key, value in states[0].items()
    }
