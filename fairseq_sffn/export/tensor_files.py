"""Files of tensors in the safetensors format, which holds no code.

A file is the length of its header (8 bytes, little endian), the header, and the data of all tensors
without gaps. The header is JSON: name -> ``dtype``, ``shape`` and ``data_offsets``. The format is
described at https://github.com/huggingface/safetensors. Files of several gigabytes are written and
read without a second copy in memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import UsageError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name in a header -> dtype."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
"""Largest number of bytes of a header, as in the safetensors library."""
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


def save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(data_of(tensor).data)


def data_of(tensor: Tensor) -> Any:
    """Return the bytes of a tensor as a NumPy array of its memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def load_model(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a folder: one file, or several with an index.

    Raises:
        UsageError: a file is missing or damaged, or names another folder.
    """
    index = folder / INDEX
    if not index.exists():
        return dict(load_file(folder / SINGLE))
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


def load_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of one file.

    Raises:
        UsageError: the file is missing or damaged.
    """
    try:
        with open(path, "rb") as file:
            yield from _read(file, path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: damaged, or not a safetensors file: {error}") from error


def _read(file: BinaryIO, path: Path) -> Iterator[tuple[str, Tensor]]:
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, LONGEST_HEADER):
        raise ValueError("its header is longer than the file")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    expected = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError(f"{name} has no size")
        # Without gaps, as the format demands. Each byte of the file is then read once.
        if begin != expected or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} is not where the header says")
        expected = end
        if 8 + length + end > size:
            raise ValueError(f"it ends before {name}")
        data = bytearray(end - begin)
        file.readinto(data)  # type: ignore[attr-defined]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        yield name, flat.view(shape)
    if 8 + length + expected != size:
        raise ValueError("it has bytes that belong to no tensor")


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
