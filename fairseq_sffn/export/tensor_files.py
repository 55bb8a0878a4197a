"""Files of tensors in the safetensors format, which holds no code: one, or several and an index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names that transformers looks for: one file, or the index of several."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Return a number of bytes such as ``5GB``, in the units of transformers' max_shard_size.

    Raises:
        UsageError: the text is no such number.
    """
    match = re.fullmatch(r"([0-9]{1,9})(B|KB|MB|GB|KiB|MiB|GiB)?", text, re.IGNORECASE)
    size = int(match[1]) * UNITS.get((match[2] or "B").upper(), 1) if match else 0
    if size < 1:
        raise UsageError(f"--max-shard-size {text}: must be a size such as 500MB or 5GB")
    return size


def save_model(tensors: Mapping[str, Tensor], folder: Path, max_size: int) -> list[str]:
    """Write tensors as transformers does: one file, or several with an index.

    Args:
        tensors: name -> tensor.
        folder: where to write.
        max_size: bytes of data per file. A larger tensor has a file of its own.

    Returns:
        The names of the files with tensors.
    """
    shards: list[dict[str, Tensor]] = [{}]
    taken = 0
    for name, tensor in tensors.items():
        if shards[-1] and taken + tensor.nbytes > max_size:
            shards.append({})
            taken = 0
        shards[-1][name] = tensor
        taken += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE)
        return [SINGLE]
    count = len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        },
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return files


def library() -> Any:
    """Return the package ``safetensors``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise UsageError("safetensors is not installed: pip install safetensors") from error
    return safetensors


def save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one file."""
    # The library refuses tensors that share memory.
    own = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    library().torch.save_file(own, path, metadata={"format": "pt"})


def load_model(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a folder: one file, or several with an index.

    Raises:
        UsageError: a file is missing or damaged, or names another folder.
    """
    index = folder / INDEX
    if not index.exists():
        return load_file(folder / SINGLE)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UsageError(f"{index}: has no weight_map")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file:
            raise UsageError(f"{index}: names the file {file}, which is not in this folder")
        tensors |= load_file(folder / file)
    if missing := sorted(set(weight_map) - set(tensors)):
        raise UsageError(f"{index}: {missing[0]} is in no file")
    return tensors


def load_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one file.

    Raises:
        UsageError: the file is missing or damaged.
    """
    safetensors = library()
    try:
        return dict(safetensors.torch.load_file(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise UsageError(f"{path}: damaged, or not a safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UsageError: the file cannot be read, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: is not a JSON object")
    return content
