"""Writing checkpoint files: a file is written whole, or not at all, and a failure is one line.

Every file is written under another name first, which ends in ``.tmp``. Where
``--write-checkpoints-asynchronously`` asks for it, a thread writes while training goes on.
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
"""Option of the group ``checkpoint`` that :func:`take_over_asynchronous_writing` sets."""
LASTING = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    )
)
"""Errors that do not go away by themselves."""
ATTEMPTS, PAUSE = 3, 2.5
"""Number of attempts to write, and seconds between them, as in fairseq."""


class Writer:
    """Writes checkpoints in a thread, one after the other, until one cannot be written."""

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
        """Raise the error of what could not be written.

        Raises:
            UsageError: something could not be written.
        """
        if self.failure is not None:
            raise self.failure

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            UsageError: something could not be written.
        """
        wait(self.pending)
        self.pending.clear()
        self.check()


_writer: ContextVar[Writer | None] = ContextVar("writer", default=None)
"""The thread that writes, while :func:`in_background` is open."""


@contextmanager
def in_background(writer: Writer | None) -> Iterator[None]:
    """A context in which checkpoints are written by a thread; ``None``: at once."""
    token = _writer.set(writer)
    try:
        yield
    finally:
        _writer.reset(token)


def take_over_asynchronous_writing(options: Any) -> None:
    """Turn fairseq's asynchronous writing off, and note that it was asked for.

    fairseq writes asynchronously by iopath. Without that package it ends as if it had trained; with
    it, it never writes ``checkpoint_last.pt`` or ``checkpoint_best.pt``. It has to be called before
    fairseq looks for the package.

    Args:
        options: the group ``checkpoint``.
    """
    if options.write_checkpoints_asynchronously:
        with open_dict(options):
            options[IN_BACKGROUND] = True
            options.write_checkpoints_asynchronously = False


def write_checkpoint(state: dict[str, Any], path: str) -> None:
    """Write a checkpoint, whole or not at all. NumPy's arrays are written as lists.

    Args:
        state: plain containers, tensors, and NumPy's arrays.
        path: the file.

    Raises:
        UsageError: it cannot be written; what was there is as it was.
    """
    state = without_numpy(state)
    if not PathManager.supports_rename(path):
        checkpoint_utils.torch_persistent_save(state, path)
    elif (writer := _writer.get()) is None:
        write_atomically(functools.partial(save, state), path, size_of(state))
    else:  # training goes on to change the tensors that it saves
        write = functools.partial(save, copy.deepcopy(state))
        writer.submit(write_atomically, write, path, size_of(state))


def copy_checkpoint(source: str, target: str) -> None:
    """Copy a checkpoint, whole or not at all.

    Raises:
        UsageError: it cannot be written; what was there is as it was.
    """
    if (writer := _writer.get()) is None:
        copy_atomically(source, target)
    else:
        writer.submit(copy_atomically, source, target)


def without_numpy(value: Any) -> Any:
    """The value with lists for NumPy's arrays and Python's numbers for its scalars, within plain
    containers too."""
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
    """Copy a file.

    Raises:
        UsageError: it cannot be written; what was there is as it was.
    """

    def write(partial: str) -> None:
        shutil.copyfile(source, partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())

    write_atomically(write, target, os.path.getsize(source))


def write_atomically(write: Callable[[str], None], path: str, size: int) -> None:
    """Write a file under another name, and give it its name when it is whole and on the disk.

    Args:
        write: writes the content to a file of this name.
        path: the file; what was there is replaced.
        size: bytes that it takes, for the message.

    Raises:
        UsageError: it cannot be written; what was there is as it was, and nothing else is left.
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
            with suppress(OSError):  # also where the folder has gone
                os.remove(partial)
        time.sleep(PAUSE)


def save(obj: Any, path: str) -> None:
    """Save to a file, and to the disk itself.

    Raises:
        OSError: it cannot be written. PyTorch's writer makes another error of it.
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
    """A file to write to that remembers the error of a failed write."""

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
    """Return, in words, what a file takes and what is left where it goes."""
    folder = Path(path).parent
    try:
        left = megabytes(free_space(folder))
        return f"it takes {megabytes(size)} and {folder} has {left} left; what was there is whole"
    except OSError as error:
        return f"{folder}: {error.strerror}"


def free_space(folder: Path) -> int:
    """Return the bytes that are left for this user."""
    return shutil.disk_usage(folder).free


def megabytes(size: int) -> str:
    """Return a size in words."""
    return f"{size / 1e6:,.1f} MB"
