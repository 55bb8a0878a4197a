"""Checksums of checkpoint files, and fingerprints of the tensors in them."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch

CHUNK = 2**22
"""Number of bytes to read at a time."""
STORAGE = "/data/"
"""Part of the name of every archive member that holds a tensor's data."""


def verify_checksums(file: str | BinaryIO, tensors: bool = True) -> None:
    """Compare every member of a PyTorch archive with the CRC-32 that PyTorch stored beside it.

    PyTorch does not do this when it loads. The comparison takes half a second per gigabyte of a
    cached file (``examples/benchmark/checksums.py``, one core of an AMD EPYC).

    Args:
        file: path or open file.
        tensors: whether to include the tensors' data. The other members are always compared.

    Raises:
        zipfile.BadZipFile: a checksum differs, or the archive is not well formed.
    """
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if tensors or STORAGE not in member.filename:
                with archive.open(member) as content:
                    while content.read(CHUNK):
                        pass


def fingerprint(
    tensors: Mapping[str, Any], include: Callable[[torch.Tensor], bool] = lambda _: True
) -> str:
    """Return a short hash of the names, types, shapes and contents of tensors.

    A different hash shows that the tensors were changed. The hash is not a signature: it is easy to
    make other tensors with the same fingerprint.

    Args:
        tensors: name -> tensor. Other values do not count.
        include: whether a tensor counts.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if torch.is_tensor(tensor) and include(tensor):
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            checksum = zlib.crc32(content.data)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {checksum}\n".encode())
    return digest.hexdigest()[:16]


def is_not_averaged(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds integers or booleans, such as a hash table.

    The mean of such tensors has no meaning.
    """
    return not (tensor.is_floating_point() or tensor.is_complex())
