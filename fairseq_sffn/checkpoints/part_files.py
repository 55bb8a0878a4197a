"""The files of a sharded checkpoint: their names, and the check that they belong together.

``checkpoint_X.pt`` is fairseq's file without the sharded parameters and their optimizer state. It
names a folder beside it. The folder has one file for each part.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .loading import KEY
from .reading import DamagedCheckpoint, read_file
from .structure import PART, check_structure

TRAINED = "shards-"
"""Prefix of the folders that training writes."""
RESHARDED = "resharded-"
"""Prefix of the folders that ``fairseq-sffn reshard`` writes."""


def new_folder(checkpoint: str | Path, name: str) -> Path:
    """Return the path of a new folder beside a checkpoint, with a random suffix."""
    return Path(checkpoint).parent / f"{name}-{secrets.token_hex(4)}"


def identity_of_part(folder: str, shard: int, shards: int) -> dict[str, Any]:
    """Return the entries that identify a part in its file."""
    return {"folder": folder, "shard": shard, "shards": shards}


def part_path(folder: Path, shard: int, shards: int) -> Path:
    """Return the path of a part, whose number ``shard`` begins at 0."""
    return folder / f"part{shard + 1}-of-{shards}.pt"


def folder_named_by(state: Any) -> str | None:
    """Return the folder that a checkpoint names; ``None``: the checkpoint is not sharded."""
    saved = state.get(KEY) if isinstance(state, dict) else None
    return saved.get("folder") if isinstance(saved, dict) else None


def named_parts(path: Path, saved: dict[str, Any]) -> list[Path]:
    """Return the files of a checkpoint's parts, which may be missing.

    Args:
        path: the checkpoint, or a link to it. The parts lie beside the checkpoint itself.
        saved: the plugin's entry in the checkpoint.
    """
    folder, shards = path.resolve().parent / saved["folder"], saved["shards"]
    return [part_path(folder, shard, shards) for shard in range(shards)]


def part_paths(path: Path, saved: dict[str, Any]) -> list[Path]:
    """Return the files of a checkpoint's parts.

    Args:
        path, saved: see :func:`named_parts`.

    Raises:
        DamagedCheckpoint: a part is missing.
    """
    paths = named_parts(path, saved)
    for part in paths:
        if not part.is_file():
            raise DamagedCheckpoint(f"checkpoint {path}: its part {part} is missing")
    return paths


def open_parts(path: Path, saved: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """Open all parts of a checkpoint.

    Args:
        path, saved: see :func:`part_paths`.

    Returns:
        Path -> content of the part. Tensors are memory-mapped, so only used data is read.

    Raises:
        UsageError: a part is missing or damaged, or belongs to another checkpoint.
    """
    parts = {}
    for shard, part in enumerate(part_paths(path, saved)):
        parts[part] = read_file(part, verify=False, mapped=True)
        check_part(parts[part], part, saved, shard)
    return parts


def check_part(part: Any, path: Path, saved: dict[str, Any], shard: int) -> None:
    """Check that a file is the part that its name says.

    Args:
        part: content of the file.
        path: the file.
        saved: the plugin's entry in the checkpoint.
        shard: number of the part, from 0.

    Raises:
        UsageError: the file is another part, or has other parameters than the checkpoint says.
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
