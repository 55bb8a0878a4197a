"""Writing checkpoint files: a file is written whole or not at all, and an error is one line.

Every file is first written under a name that ends in ``.tmp``. With
``--write-checkpoints-asynchronously``, a thread writes while training goes on.
"""

from __future__ import annotations

import copy
import errno
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from omegaconf import open_dict

from ..errors import UsageError

IN_BACKGROUND = "write_in_background"
"""Option in the group ``checkpoint`` that :func:`take_over_asynchronous_writing` sets."""
LASTING = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    )
)
"""Error numbers for which another attempt is pointless."""
ATTEMPTS, PAUSE = 3, 2.5
"""Number of attempts to write, and seconds between them, as in fairseq."""


class Writer:
    """Writes checkpoints in a thread, one after another, until a write fails."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self.pending: list[Future[None]] = []
        self.failure: BaseException | None = None

    def submit(self, write: Callable[..., None], *args: Any) -> None:
        """Call ``write(*args)`` in the thread."""
        self.pending.append(self.thread.submit(self._write, write, *args))

    def _write(self, write: Callable[..., None], *args: Any) -> None:
        if self.failure is None:  # a copy needs the file before it
            try:
                write(*args)
            except BaseException as error:
                self.failure = error

    def check(self) -> None:
        """Raise the error of a failed write, if there is one.

        Raises:
            UsageError: a file could not be written.
        """
        if self.failure is not None:
            raise self.failure

    def wait(self) -> None:
        """Wait until all files are written.

        Raises:
            UsageError: a file could not be written.
        """
        wait(self.pending)
        self.pending.clear()
        self.check()


_writer: ContextVar[Writer | None] = ContextVar("writer", default=None)
"""The writer of the open :func:`in_background` context."""


@contextmanager
def in_background(writer: Writer | None) -> Iterator[None]:
    """Return a context in which a thread writes checkpoints; ``None``: the caller writes them."""
    token = _writer.set(writer)
    try:
        yield
    finally:
        _writer.reset(token)


def take_over_asynchronous_writing(options: Any) -> None:
    """Turn off fairseq's asynchronous writing, and set ``IN_BACKGROUND`` if it was on.

    fairseq writes asynchronously with iopath. Without iopath, it ends as if it had trained. With
    iopath, it never writes ``checkpoint_last.pt`` and ``checkpoint_best.pt``. Call this function
    before fairseq looks for iopath.

    Args:
        options: the option group ``checkpoint``.
    """
    if options.write_checkpoints_asynchronously:
        with open_dict(options):
            options[IN_BACKGROUND] = True
            options.write_checkpoints_asynchronously = False


def write_checkpoint(state: dict[str, Any], path: str) -> None:
    """Write a checkpoint, whole or not at all. NumPy arrays are written as lists.

    Args:
        state: plain containers, tensors and NumPy arrays.
        path: the file.

    Raises:
        UsageError: the file cannot be written. An existing file stays as it was.
    """
    state = without_numpy(state)
    if not PathManager.supports_rename(path):
        checkpoint_utils.torch_persistent_save(state, path)
    elif (writer := _writer.get()) is None:
        write_atomically(functools.partial(save, state), path, size_of(state))
    else:  # training goes on and changes the tensors
        write = functools.partial(save, copy.deepcopy(state))
        writer.submit(write_atomically, write, path, size_of(state))


def copy_checkpoint(source: str, target: str) -> None:
    """Copy a checkpoint, whole or not at all.

    Raises:
        UsageError: the copy cannot be written. An existing file stays as it was.
    """
    if (writer := _writer.get()) is None:
        copy_atomically(source, target)
    else:
        writer.submit(copy_atomically, source, target)


def without_numpy(value: Any) -> Any:
    """Return a value with NumPy arrays as lists and NumPy scalars as Python numbers.

    The function also converts the items of plain containers.
    """
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(without_numpy, value))
    if isinstance(value, dict):
        result = copy.copy(value)  # with the attributes that a model's state has
        for key, of in value.items():
            result[key] = without_numpy(of)
        return result
    return value


def copy_atomically(source: str, target: str) -> None:
    """Copy a file, whole or not at all.

    Raises:
        UsageError: the copy cannot be written. An existing file stays as it was.
    """

    def write(partial: str) -> None:
        shutil.copyfile(source, partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())

    write_atomically(write, target, os.path.getsize(source))


def write_atomically(write: Callable[[str], None], path: str, size: int) -> None:
    """Write a file under a temporary name, and rename it when it is whole and on the disk.

    Args:
        write: writes the content to a file of the given name.
        path: the file. An existing file is replaced.
        size: bytes of the file, for the message.

    Raises:
        UsageError: the file cannot be written. An existing file stays as it was, and no temporary
            file is left.
    """
    partial = f"{path}.tmp"
    for attempt in range(ATTEMPTS):
        try:
            write(partial)
            os.replace(partial, path)
            return
        except OSError as error:
            if error.errno in LASTING or attempt == ATTEMPTS - 1:
                raise UsageError(
                    f"checkpoint {path}: not written: {error.strerror or error}; "
                    f"{room_for(path, size)}"
                ) from error
        finally:
            with suppress(OSError):  # the folder may be gone
                os.remove(partial)
        time.sleep(PAUSE)


def save(obj: Any, path: str) -> None:
    """Save an object with ``torch.save``, and flush it to the disk.

    Raises:
        OSError: the file cannot be written. ``torch.save`` itself hides this error.
    """
    with open(path, "wb") as raw:
        file = Remembering(raw)
        try:
            torch.save(obj, file)  # type: ignore[arg-type]
            raw.flush()
            os.fsync(raw.fileno())
        except RuntimeError:
            if file.error is not None:
                raise file.error from None
            raise


class Remembering:
    """A file for writing that keeps the error of a failed write."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def size_of(value: Any) -> int:
    """Return the bytes of the tensors in plain containers, each storage counted once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if torch.is_tensor(value):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for of in value.values():
                visit(of)
        elif isinstance(value, list | tuple):
            for of in value:
                visit(of)

    visit(value)
    return sum(storages.values())


def room_for(path: str, size: int) -> str:
    """Return in words the size of a file and the free space of its folder."""
    folder = Path(path).parent
    try:
        left = megabytes(free_space(folder))
        return f"it takes {megabytes(size)} and {folder} has {left} left; what was there is whole"
    except OSError as error:
        return f"{folder}: {error.strerror}"


def free_space(folder: Path) -> int:
    """Return the number of bytes that this user can still write to a folder."""
    return shutil.disk_usage(folder).free


def megabytes(size: int) -> str:
    """Return a number of bytes in words, in MB."""
    return f"{size / 1e6:,.1f} MB"
