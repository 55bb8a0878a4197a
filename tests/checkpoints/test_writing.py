"""A checkpoint is written completely or not at all, and a failure is one line."""

import errno
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from fairseq.logging.meters import AverageMeter, SumMeter
from fairseq.trainer import Trainer

from fairseq_sffn.checkpoints import writing
from fairseq_sffn.checkpoints.reading import read_file
from fairseq_sffn.errors import UsageError
from fairseq_sffn.patches.training_state import restore_arrays_of_meters
from tests import commands

FULL = Path("/dev/full")
"""A device on which every write fails for lack of space."""


# Plain containers


def test_numpy_is_saved_as_plain_values(tmp_path: Path) -> None:
    model = OrderedDict(w=torch.ones(2))
    model._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    state = {
        "model": model,
        "meters": [(1, {"sum": np.array([1, 2]), "best": np.float64(0.5)})],
        "count": np.int64(3),
    }
    path = tmp_path / "numpy.pt"
    writing.write_checkpoint(state, str(path))
    saved = torch.load(path, weights_only=True)
    assert saved["meters"] == [(1, {"sum": [1, 2], "best": 0.5})] and saved["count"] == 3
    assert saved["model"]["w"].tolist() == [1, 1] and saved["model"]._metadata == model._metadata
    assert isinstance(state["meters"][0][1]["sum"], np.ndarray)  # the caller's object is unchanged
    checkpoint_utils.torch_persistent_save(state, str(path))
    with pytest.raises(UsageError, match="refused, it holds more than tensors"):
        read_file(path)


@pytest.mark.parametrize("kind", [AverageMeter, SumMeter])
def test_meters_of_arrays_go_on_from_saved_lists(kind: type) -> None:
    metrics.reset()
    with metrics.aggregate("arrays"):
        metrics.log_custom(kind, "counts", np.array([1, 2]))
    meter = metrics.get_meter("arrays", "counts")
    saved = writing.without_numpy({"metrics": metrics.state_dict()})
    metrics.load_state_dict(saved["metrics"])
    restore_arrays_of_meters(saved)
    resumed = metrics.get_meter("arrays", "counts")
    assert resumed is not meter
    np.testing.assert_array_equal(resumed.smoothed_value, meter.smoothed_value)
    for each in (meter, resumed):
        each.update(np.array([5, 6]))
    np.testing.assert_array_equal(resumed.smoothed_value, meter.smoothed_value)


# One file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_copy_replaces(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    for target in ("last", "last"):
        assert PathManager.copy(str(tmp_path / "new"), str(tmp_path / target), overwrite=True)
    assert (tmp_path / "last").read_bytes() == b"new"
    assert names(tmp_path) == ["last", "new"]


@pytest.mark.parametrize("step", ["write", "sync", "replace"])
@pytest.mark.parametrize("kind", ["save", "copy"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_failure_leaves_what_was_there(
    number: int, kind: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of writing may fail. Errors that may pass are tried again."""
    tries = []

    def fail(*args: Any, **kwargs: Any) -> None:
        tries.append(args)
        if step == "write" and kind == "copy":
            Path(args[1]).write_bytes(b"n")
        raise OSError(number, os.strerror(number))

    new, last = tmp_path / "new", tmp_path / "last"
    new.write_bytes(b"new")
    last.write_bytes(b"old")
    owner, name = {
        "write": (writing.shutil, "copyfile") if kind == "copy" else (writing.Remembering, "write"),
        "sync": (writing.os, "fsync"),
        "replace": (writing.os, "replace"),
    }[step]
    monkeypatch.setattr(writing, "PAUSE", 0)
    with monkeypatch.context() as patch, pytest.raises(UsageError) as caught:
        patch.setattr(owner, name, fail)
        if kind == "copy":
            PathManager.copy(str(new), str(last), overwrite=True)
        else:
            writing.write_checkpoint({"w": torch.ones(1000)}, str(last))
    line = str(caught.value)
    assert line.startswith(f"checkpoint {last}: not written: {os.strerror(number)}; it takes ")
    assert f"{tmp_path} has " in line and "\n" not in line
    assert last.read_bytes() == b"old" and names(tmp_path) == ["last", "new"]
    if step == "replace" or kind == "copy":  # PyTorch's writer writes again as it closes
        assert len(tries) == (writing.ATTEMPTS if number == errno.EIO else 1)


def test_an_error_that_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, tries = os.replace, []

    def fail_once(*args: Any) -> None:
        tries.append(args)
        if len(tries) == 1:
            raise OSError(errno.EIO, "input/output error")
        replace(*args)

    monkeypatch.setattr(writing.os, "replace", fail_once)
    monkeypatch.setattr(writing, "PAUSE", 0)
    writing.write_checkpoint({"a": 1}, str(tmp_path / "new.pt"))
    assert read_file(tmp_path / "new.pt") == {"a": 1} and names(tmp_path) == ["new.pt"]


def test_size_counts_each_storage_once() -> None:
    table = torch.ones(100)
    state = {"a": table, "b": [table[:50], (torch.ones(3, dtype=torch.float64),)], "c": "text"}
    assert writing.size_of(state) == 400 + 24


# Trainings


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the names of files for which there is no space."""
    if not FULL.exists():
        pytest.skip(f"no {FULL} here")
    refused: list[str] = []
    original_open, copyfile = open, shutil.copyfile

    def full(path: Any) -> bool:
        return any(Path(path).name == f"{name}.tmp" for name in refused)

    def open_on_full(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode and full(path):
            original_open(path, mode).close()  # the empty file that stays there
            path = FULL
        return original_open(path, mode, *args, **kwargs)

    def copy_on_full(source: Any, target: Any) -> Any:
        if full(target):
            original_open(target, "wb").close()
            target = FULL
        return copyfile(source, target)

    monkeypatch.setattr(writing, "open", open_on_full, raising=False)
    monkeypatch.setattr(writing.shutil, "copyfile", copy_on_full)
    yield refused


SAVING = ("--save-interval-updates", "2", "--no-epoch-checkpoints", "--disable-validation")


@pytest.mark.parametrize("asynchronous", [(), ("--write-checkpoints-asynchronously",)])
@pytest.mark.parametrize("file", ["checkpoint_1_4.pt", "checkpoint_last.pt"])
def test_full_disk(
    file: str,
    asynchronous: tuple[str, ...],
    full_disk: list[str],
    data_bin: Path,
    tmp_path: Path,
) -> None:
    """The error is one line, earlier checkpoints stay whole, and the next start resumes from the
    newest."""
    flags = (*SAVING, *asynchronous)
    commands.train(data_bin, tmp_path, "avgk", *flags, "--max-update", "3")
    commands.train(data_bin, tmp_path, "avgk", *flags, "--max-update", "3")
    full_disk.append(file)
    with pytest.raises(UsageError, match=rf"{file}: not written: No space left on device; it"):
        commands.train(data_bin, tmp_path, "avgk", *flags)
    assert not list(tmp_path.glob("*.tmp"))
    kept = {path.name for path in tmp_path.glob("*.pt")}
    assert {"checkpoint_1_2.pt", "checkpoint_last.pt"} <= kept
    for name in kept:
        read_file(tmp_path / name)
    full_disk.clear()
    log = commands.train(data_bin, tmp_path, "avgk", *flags)
    at_last = file == "checkpoint_last.pt"
    assert list(commands.losses(log)) == ([5, 6] if at_last else [4, 5, 6])
    went_on = f"training goes on from {tmp_path / 'checkpoint_1_4.pt'}, the newest whole checkpoint"
    assert (went_on in log) == at_last


def test_a_thread_that_cannot_write_ends_the_training_soon(
    full_disk: list[str], data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error does not wait for the next checkpoint."""
    submit = writing.Writer.submit

    def submit_and_wait(self: Any, *args: Any) -> None:
        submit(self, *args)
        self.thread.submit(int).result()

    monkeypatch.setattr(writing.Writer, "submit", submit_and_wait)
    full_disk.append("checkpoint_1_2.pt")
    steps: list[int] = []
    step = Trainer.train_step

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.get_num_updates())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", count)
    flags = ("--write-checkpoints-asynchronously", "--max-update", "6", "--save-interval", "9")
    with pytest.raises(UsageError, match="No space left on device"):
        commands.train(
            data_bin,
            tmp_path,
            "avgk",
            "--save-interval-updates",
            "2",
            *flags,
            "--log-interval",
            "1",
        )
    assert steps == [0, 1, 2]


def test_folder_that_becomes_a_file(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_dir, original = tmp_path / "run", checkpoint_utils.save_checkpoint

    def replace_folder(*args: Any, **kwargs: Any) -> Any:
        shutil.rmtree(save_dir)
        save_dir.write_text("a file")
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpoint_utils, "save_checkpoint", replace_folder)
    with pytest.raises(UsageError) as caught:
        commands.train(data_bin, save_dir, "avgk", *SAVING)
    assert str(caught.value).startswith(f"--save-dir {save_dir}: cannot be written to at update 2:")


def test_folder_that_goes_is_made_again(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_dir, original = tmp_path / "run", checkpoint_utils.save_checkpoint

    def remove_folder(*args: Any, **kwargs: Any) -> Any:
        shutil.rmtree(save_dir, ignore_errors=True)
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpoint_utils, "save_checkpoint", remove_folder)
    commands.train(data_bin, save_dir, "avgk", *SAVING)
    assert names(save_dir) == ["checkpoint_1_6.pt", "checkpoint_last.pt"]


# In the background


def test_background_writes_what_the_foreground_does(data_bin: Path, tmp_path: Path) -> None:
    """All files have the same contents. The thread reads no tensor that training goes on to
    change."""
    flags = ("--save-interval-updates", "2", "--keep-best-checkpoints", "2")
    flags = (*flags, "--keep-interval-updates", "2", "--max-update", "9")
    states = {}
    for name, more in (("front", ()), ("back", ("--write-checkpoints-asynchronously",))):
        log = commands.train(data_bin, tmp_path / name, "avgk", *flags, *more)
        assert "iopath" not in log
        states[name] = {
            path.name: torch.load(path, weights_only=True)
            for path in (tmp_path / name).glob("checkpoint*.pt")
        }
    assert {"checkpoint_last.pt", "checkpoint_best.pt"} <= states["back"].keys()
    # The next save removes one of the others.
    assert states["front"].keys() <= states["back"].keys()
    for file, state in states["front"].items():
        for part in ("model", "last_optimizer_state"):
            other = states["back"][file][part]
            torch.testing.assert_close(other, state[part], rtol=0, atol=0)


def test_training_goes_on_while_a_thread_writes(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file is written only after another update. It has the tensors of its own update."""
    updated, save, train_step = threading.Event(), writing.save, Trainer.train_step
    waited = []

    def save_late(obj: Any, path: str) -> None:
        if "checkpoint_1_2" in path:
            waited.append(updated.wait(60))
        save(obj, path)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = train_step(self, *args, **kwargs)
        if self.get_num_updates() == 3:
            updated.set()
        return result

    monkeypatch.setattr(writing, "save", save_late)
    monkeypatch.setattr(Trainer, "train_step", step)
    flags = (*SAVING, "--write-checkpoints-asynchronously", "--max-update", "4")
    commands.train(data_bin, tmp_path, "avgk", *flags)
    assert waited == [True]
    monkeypatch.undo()
    commands.train(data_bin, tmp_path / "front", "avgk", *SAVING, "--max-update", "2")
    want = read_file(tmp_path / "front" / "checkpoint_1_2.pt")
    got = read_file(tmp_path / "checkpoint_1_2.pt")
    for part in ("model", "last_optimizer_state"):
        torch.testing.assert_close(got[part], want[part], rtol=0, atol=0)


def test_a_checkpoint_waits_for_the_one_before(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one copy of the training's state takes memory."""
    save, submit = writing.save, writing.Writer.submit
    unwritten: list[int] = []

    def save_slowly(obj: Any, path: str) -> None:
        time.sleep(0.2)
        save(obj, path)

    def count(self: Any, write: Any, *args: Any) -> None:
        if write is writing.write_atomically:
            unwritten.append(sum(not future.done() for future in self.pending))
        submit(self, write, *args)

    monkeypatch.setattr(writing, "save", save_slowly)
    monkeypatch.setattr(writing.Writer, "submit", count)
    flags = (*SAVING, "--save-interval-updates", "1", "--write-checkpoints-asynchronously")
    commands.train(data_bin, tmp_path, "avgk", *flags, "--max-update", "4")
    assert len(unwritten) >= 4 and not any(unwritten)


def test_hydra_writes_in_the_background(data_bin: Path, tmp_path: Path) -> None:
    """hydra builds its training function before the plugin is loaded."""
    log = commands.hydra_train(
        *(data_bin, tmp_path, "checkpoint.write_checkpoints_asynchronously=true"),
        *("common.log_format=json", "common.log_interval=1", "common.no_progress_bar=true"),
        *("optimization.max_update=2", "task.tokens_per_sample=16", "dataset.batch_size=8"),
        *("+model.decoder_layers=2", "+model.decoder_embed_dim=16", "+model.sffn_block_size=64"),
        "+model.decoder_attention_heads=2",
    )
    assert commands.losses(log) and (tmp_path / "checkpoint_last.pt").is_file()
