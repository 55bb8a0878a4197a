"""Reads checkpoint files: nothing in them is run, and damage is noticed."""

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
    """A file that is not what its writer wrote, or is not there."""


def read_file(path: str | Path, *, verify: bool = True, mapped: bool = False) -> Any:
    """Read what a file of PyTorch holds, without running anything in it.

    Args:
        path: the file, of today's format or that of PyTorch before 1.6, which has no checksums.
        verify: compare the tensors' data with their checksums (see :func:`verify_file`).
        mapped: map tensors instead of reading them; not for files of PyTorch before 1.6.

    Raises:
        DamagedCheckpoint: the file is missing, truncated, damaged, or not a checkpoint.
        UsageError: it holds more than tensors and plain containers.
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
        except Exception as error:  # whatever PyTorch's reader makes of damaged bytes
            raise DamagedCheckpoint(f"checkpoint {path}: damaged, or not a checkpoint") from error


def is_archive(path: str | Path, file: BinaryIO) -> bool:
    """Return whether a file is of today's format.

    Raises:
        DamagedCheckpoint: it is, but its directory is damaged.
    """
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile as error:
        raise DamagedCheckpoint(f"checkpoint {path}: damaged: {error}") from error


def open_file(path: str | Path) -> BinaryIO:
    """Open a file to read.

    Raises:
        DamagedCheckpoint: it is not there.
        UsageError: it cannot be read.
    """
    try:
        return open(path, "rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DamagedCheckpoint(f"checkpoint {path}: there is no such file") from error
    except OSError as error:
        raise UsageError(f"checkpoint {path}: cannot be read: {error.strerror}") from error


def verify_file(path: str | Path, file: BinaryIO, tensors: bool = True) -> None:
    """Compare a file of today's format with its checksums, unless ``--skip-checksums`` says
    otherwise; what is not tensors' data always is.

    Args:
        path: the file, for the message.
        file: the same, open.
        tensors: include the tensors' data.

    Raises:
        DamagedCheckpoint: a checksum differs.
    """
    try:
        verify_checksums(file, tensors=tensors and not os.environ.get(SKIP_CHECKSUMS))
    except Exception as error:  # whatever the archive's reader makes of damaged bytes
        raise DamagedCheckpoint(
            f"checkpoint {path}: damaged: {error}; --skip-checksums loads damaged tensors"
        ) from error


def is_of_old_torch(file: BinaryIO) -> bool:
    """Return whether a file begins as those of PyTorch before 1.6 do: with a number. Published
    models are in such files. Nothing in it is run."""
    begin = pickle.dumps(MAGIC_NUMBER, protocol=2)
    file.seek(0)
    return file.read(len(begin)) == begin
