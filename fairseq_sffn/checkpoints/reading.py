"""Reading checkpoint files without running their content, and detecting damage."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import MAGIC_NUMBER

from ..errors import UsageError
from .integrity import verify_checksums

SKIP_CHECKSUMS = "FAIRSEQ_SFFN_SKIP_CHECKSUMS"
"""Environment variable that ``--skip-checksums`` sets."""


class DamagedCheckpoint(UsageError):
    """Raised if a file is missing, damaged or not a checkpoint."""


def read_file(path: str | Path, *, verify: bool = True, mapped: bool = False) -> Any:
    """Read a file of ``torch.save`` without running anything in it.

    Args:
        path: the file. Files of PyTorch before 1.6 have another format, without checksums.
        verify: whether to compare the tensors' data with their checksums (:func:`verify_file`).
        mapped: whether to map tensors instead of reading them. Files of PyTorch before 1.6 are
            always read.

    Returns:
        The content, with tensors on the CPU.

    Raises:
        DamagedCheckpoint: the file is missing, truncated, damaged, or not a checkpoint.
        UsageError: the file holds more than tensors and plain containers.
    """
    with open_file(path) as file:
        of_today = is_archive(path, file)
        mapped = mapped and of_today
        if of_today:
            verify_file(path, file, tensors=verify)
        elif not is_of_old_torch(file):
            raise DamagedCheckpoint(f"checkpoint {path}: truncated, or not a checkpoint")
        file.seek(0)
        try:
            # The configuration of older optimizers is a Namespace: a plain container.
            with torch.serialization.safe_globals([argparse.Namespace]):
                source = path if mapped else file
                return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise UsageError(
                f"checkpoint {path}: refused, it holds more than tensors and plain containers, "
                "and could run code"
            ) from error
        except Exception as error:  # PyTorch's reader raises many errors on damaged bytes
            raise DamagedCheckpoint(f"checkpoint {path}: damaged, or not a checkpoint") from error


def is_archive(path: str | Path, file: BinaryIO) -> bool:
    """Return whether a file has the current format, a zip archive.

    Raises:
        DamagedCheckpoint: the directory of the archive is damaged.
    """
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile as error:
        raise DamagedCheckpoint(f"checkpoint {path}: damaged: {error}") from error


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        DamagedCheckpoint: the file does not exist.
        UsageError: the file cannot be read.
    """
    try:
        return open(path, "rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DamagedCheckpoint(f"checkpoint {path}: there is no such file") from error
    except OSError as error:
        raise UsageError(f"checkpoint {path}: cannot be read: {error.strerror}") from error


def verify_file(path: str | Path, file: BinaryIO, tensors: bool = True) -> None:
    """Compare a file of the current format with its checksums.

    ``--skip-checksums`` skips the tensors' data, but not the other members.

    Args:
        path: the file, for the message.
        file: the same file, open.
        tensors: whether to include the tensors' data.

    Raises:
        DamagedCheckpoint: a checksum differs.
    """
    try:
        verify_checksums(file, tensors=tensors and not os.environ.get(SKIP_CHECKSUMS))
    except Exception as error:  # zipfile raises many errors on damaged bytes
        raise DamagedCheckpoint(
            f"checkpoint {path}: damaged: {error}; --skip-checksums loads damaged tensors"
        ) from error


def is_of_old_torch(file: BinaryIO) -> bool:
    """Return whether a file has the format of PyTorch before 1.6, which begins with a magic number.

    Published models have this format. The function runs nothing in the file.
    """
    begin = pickle.dumps(MAGIC_NUMBER, protocol=2)
    file.seek(0)
    return file.read(len(begin)) == begin
