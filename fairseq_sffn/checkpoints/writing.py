"""fairseq's writing functions: a file is written whole, or not at all, and a failure is one line.

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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq.logging.meters import AverageMeter, SumMeter
from fairseq.trainer import Trainer
from fairseq_cli import train as train_command
from omegaconf import open_dict

from ..compat import replace_once
from ..errors import UsageError
from .loading import set_for_now

LASTING = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    )
)
"""Errors that do not go away by themselves."""
ATTEMPTS, PAUSE = 3, 2.5
"""As often fairseq tries to write, and waits so many seconds in between."""


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


_asked: ContextVar[bool] = ContextVar("asked", default=False)
_writer: ContextVar[Writer | None] = ContextVar("writer", default=None)


def apply() -> None:
    """Apply every patch."""
    write_whole_files()
    copy_whole_files()
    save_plain_containers()
    restore_arrays_of_meters()
    write_in_the_background()
    save_or_say_why_not()


def save_plain_containers() -> None:
    """Meters hold NumPy's arrays (``--eval-bleu`` counts in them), which PyTorch refuses to load
    from a checkpoint. Saves lists and Python's numbers. Can go when fairseq does."""

    @functools.wraps(checkpoint_utils.torch_persistent_save)
    def torch_persistent_save(obj: Any, *args: Any, **kwargs: Any) -> None:
        original(without_numpy(obj), *args, **kwargs)

    original = checkpoint_utils.torch_persistent_save
    replace_once(checkpoint_utils, "torch_persistent_save", torch_persistent_save)


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


def restore_arrays_of_meters() -> None:
    """A meter that summed arrays cannot average the list that is saved of them: arrays again. Can
    go with ``save_plain_containers``."""

    def restoring(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def load_state_dict(self: Any, state: dict[str, Any]) -> None:
            arrays = {key: np.array(of) for key, of in state.items() if isinstance(of, list)}
            original(self, {**state, **arrays})

        return load_state_dict

    for meter in (AverageMeter, SumMeter):
        replace_once(meter, "load_state_dict", restoring(meter.load_state_dict))


def write_whole_files() -> None:
    """fairseq leaves a part of a file where the disk is full, and tells so in a page. Can go when
    it cleans up."""

    @functools.wraps(checkpoint_utils.torch_persistent_save)
    def torch_persistent_save(obj: Any, filename: str, async_write: bool = False) -> None:
        if async_write or not PathManager.supports_rename(filename):
            return original(obj, filename, async_write)
        if (writer := _writer.get()) is None:
            return write_atomically(functools.partial(save, obj), filename, size_of(obj))
        # Training goes on to change the tensors that it saves.
        write = functools.partial(save, copy.deepcopy(obj))
        return writer.submit(write_atomically, write, filename, size_of(obj))

    original = checkpoint_utils.torch_persistent_save
    replace_once(checkpoint_utils, "torch_persistent_save", torch_persistent_save)


def copy_whole_files() -> None:
    """fairseq writes ``checkpoint1.pt`` atomically but copies it over ``checkpoint_last.pt`` in
    place: killed meanwhile, it leaves no checkpoint to resume from. Can go when
    ``PathManager.copy`` is atomic."""

    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if PathManager.path_requires_pathmanager(str(dst_path)):
            return original(src_path, dst_path, overwrite)
        if (writer := _writer.get()) is None:
            copy_atomically(src_path, dst_path)
        else:
            writer.submit(copy_atomically, src_path, dst_path)
        return True

    original = PathManager.copy
    replace_once(PathManager, "copy", copy, staticmethod)


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


def write_in_the_background() -> None:
    """fairseq writes asynchronously by iopath: without it, it ends as if it had trained, and with
    it, it never writes ``checkpoint_last.pt`` or ``checkpoint_best.pt``. Writes and copies in a
    thread. Can go when fairseq's does both."""

    @functools.wraps(train_command.add_defaults)
    def add_defaults(cfg: Any) -> None:
        original_defaults(cfg)
        _asked.set(bool(cfg.checkpoint.write_checkpoints_asynchronously))
        with open_dict(cfg.checkpoint):
            cfg.checkpoint.write_checkpoints_asynchronously = False

    @functools.wraps(checkpoint_utils.save_checkpoint)
    def save_checkpoint(cfg: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if not _asked.get():
            return original(cfg, trainer, *args, **kwargs)
        if not hasattr(trainer, "sffn_writer"):
            trainer.sffn_writer = Writer()
        trainer.sffn_writer.wait()  # for the one before, so that no more than one takes memory
        with set_for_now(_writer, trainer.sffn_writer):
            return original(cfg, trainer, *args, **kwargs)

    @functools.wraps(train_command.validate_and_save)
    def validate_and_save(cfg: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if hasattr(trainer, "sffn_writer"):
            trainer.sffn_writer.check()  # after each update, so that no more are lost
        return original_step(cfg, trainer, *args, **kwargs)

    @functools.wraps(train_command.train)
    def train(cfg: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        try:
            return original_train(cfg, trainer, *args, **kwargs)
        finally:
            if hasattr(trainer, "sffn_writer"):
                trainer.sffn_writer.wait()

    original_defaults, original = train_command.add_defaults, checkpoint_utils.save_checkpoint
    original_train, original_step = train_command.train, train_command.validate_and_save
    replace_once(train_command, "add_defaults", add_defaults)
    replace_once(checkpoint_utils, "save_checkpoint", save_checkpoint)
    replace_once(train_command, "train", train)
    replace_once(train_command, "validate_and_save", validate_and_save)


def save_or_say_why_not() -> None:
    """fairseq ends in a traceback where the directory for checkpoints is gone or read-only. Can go
    when it names the flag and the reason."""

    @functools.wraps(checkpoint_utils.save_checkpoint)
    def save_checkpoint(cfg: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(cfg, trainer, *args, **kwargs)
        except OSError as error:
            raise UsageError(
                f"--save-dir {cfg.save_dir}: cannot be written to at update "
                f"{trainer.get_num_updates()}: {error.strerror or error}: {error.filename}"
            ) from error

    original = checkpoint_utils.save_checkpoint
    replace_once(checkpoint_utils, "save_checkpoint", save_checkpoint)
