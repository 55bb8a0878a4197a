"""Each repair of fairseq, with what breaks without it."""

import argparse
import importlib
import inspect
import shutil
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import commands
import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import TokenBlockDataset
from fairseq.file_io import PathManager
from fairseq.logging.meters import AverageMeter, SumMeter
from fairseq.models.ema.ema import EMA
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.trainer import Trainer
from fairseq_cli import eval_lm as eval_command
from fairseq_cli import train as train_command

from fairseq_sffn import compat
from fairseq_sffn.errors import UsageError

REPAIRED = [
    (PathManager, "copy"),
    (checkpoint_utils, "torch_persistent_save"),
    (AverageMeter, "load_state_dict"),
    (SumMeter, "load_state_dict"),
    (checkpoint_utils, "verify_checkpoint_directory"),
    (checkpoint_utils, "load_checkpoint_to_cpu"),
    (checkpoint_utils, "load_ema_from_checkpoint"),
    (checkpoint_utils, "load_model_ensemble_and_task"),
    (Trainer, "__init__"),
    (LanguageModelingTask, "eval_lm_dataloader"),
    (eval_command, "main"),
    (train_command, "train"),
    (EMA, "__init__"),
    (FairseqTask, "get_batch_iterator"),
]


def unrepaired(owner: Any, name: str) -> Any:
    """fairseq's own function."""
    return inspect.unwrap(getattr(owner, name))


def test_applying_twice_changes_nothing() -> None:
    before = [getattr(owner, name) for owner, name in REPAIRED]
    numpy_compat = np.compat
    compat.apply()
    importlib.reload(compat).apply()
    assert [getattr(owner, name) for owner, name in REPAIRED] == before
    assert np.compat is numpy_compat


def test_numpy_compat(monkeypatch: pytest.MonkeyPatch) -> None:
    def sentences() -> TokenBlockDataset:
        tokens = [torch.tensor([4, 5, 2]), torch.tensor([6, 2])]
        sizes = np.array([3, 2])
        return TokenBlockDataset(tokens, sizes, block_size=None, pad=1, eos=2, break_mode="eos")

    assert len(sentences()) == 2
    monkeypatch.delattr(np, "compat")
    with pytest.raises(AttributeError, match="compat"):
        sentences()
    compat.restore_numpy_compat()
    assert len(sentences()) == 2


# Copies.


def test_copy_replaces(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    for target in ("last", "last"):
        assert PathManager.copy(tmp_path / "new", tmp_path / target, overwrite=True)
    assert (tmp_path / "last").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "new"]


@pytest.mark.parametrize("failing", ["copyfile", "replace"])
def test_failed_copy_leaves_the_target(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: str, target: str) -> None:
        if failing == "copyfile":
            Path(target).write_bytes(b"n")
        raise OSError("disk full")

    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "last").write_bytes(b"old")
    monkeypatch.setattr(shutil if failing == "copyfile" else compat.os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        PathManager.copy(str(tmp_path / "new"), str(tmp_path / "last"), overwrite=True)
    assert (tmp_path / "last").read_bytes() == b"old"


# Checkpoints.


def save(state: Any, path: Path) -> str:
    torch.save(state, path)
    return str(path)


def test_checkpoint_of_plain_values_is_accepted(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2)}, "cfg": {"a": [1, None, "b"]}, "step": 3}
    compat.check_checkpoint(save(state, tmp_path / "good.pt"))


@pytest.mark.parametrize("size", [1.0, 0.9, 0.02])
def test_checkpoint_of_old_pytorch(size: float, tmp_path: Path) -> None:
    """That of before 1.6 is read without running anything in it, too."""
    path = tmp_path / "old.pt"
    state = {"model": {"w": torch.arange(1000.0)}, "args": argparse.Namespace(arch="a")}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(size * len(content))])
    if size == 1:
        assert torch.equal(compat.check_checkpoint(str(path))["model"]["w"], torch.arange(1000.0))
        torch.save({"x": print}, path, _use_new_zipfile_serialization=False)
        with pytest.raises(UsageError, match="refused, it holds more than tensors"):
            compat.check_checkpoint(str(path))
    else:
        with pytest.raises(UsageError, match="damaged, or not a checkpoint"):
            compat.check_checkpoint(str(path))


@pytest.mark.parametrize("load", ["load_model_ensemble", "load_model_ensemble_and_task"])
def test_only_names_that_fairseq_reads_are_checked(load: str, tmp_path: Path) -> None:
    """A suffix or shards make other names of the given one."""
    save({"x": print}, tmp_path / "m-1.pt")
    function = getattr(checkpoint_utils, load)
    with pytest.raises(UsageError, match=r"m\.pt: there is no such file"):
        function([str(tmp_path / "m.pt")])
    for arguments in ({"suffix": "-1"}, {"suffix": "-1", "state": None}):
        with pytest.raises(UsageError, match=r"m-1\.pt: refused, it holds"):
            function([str(tmp_path / "m.pt")], **arguments)
    with pytest.raises(OSError, match=r"m_part0\.pt"):
        function([str(tmp_path / "m.pt")], num_shards=2, strict=False)


def test_numpy_is_saved_as_plain_values(tmp_path: Path) -> None:
    model = OrderedDict(w=torch.ones(2))
    model._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    state = {
        "model": model,
        "meters": [(1, {"sum": np.array([1, 2]), "best": np.float64(0.5)})],
        "count": np.int64(3),
    }
    path = tmp_path / "numpy.pt"
    checkpoint_utils.torch_persistent_save(state, str(path))
    saved = torch.load(path, weights_only=True)
    assert saved["meters"] == [(1, {"sum": [1, 2], "best": 0.5})] and saved["count"] == 3
    assert saved["model"]["w"].tolist() == [1, 1] and saved["model"]._metadata == model._metadata
    assert isinstance(state["meters"][0][1]["sum"], np.ndarray)  # the caller's is as it was
    unrepaired(checkpoint_utils, "torch_persistent_save")(state, str(path))
    with pytest.raises(UsageError, match="refused, it holds more than tensors"):
        compat.check_checkpoint(str(path))


@pytest.mark.parametrize("kind", [AverageMeter, SumMeter])
def test_meters_of_arrays_go_on_from_saved_lists(kind: type) -> None:
    meter, resumed = kind(), kind()
    meter.update(np.array([1, 2]))
    resumed.load_state_dict(compat.without_numpy(meter.state_dict()))
    np.testing.assert_array_equal(resumed.smoothed_value, meter.smoothed_value)
    for each in (meter, resumed):
        each.update(np.array([5, 6]))
    np.testing.assert_array_equal(resumed.smoothed_value, meter.smoothed_value)


@pytest.mark.parametrize("value", [print, SimpleNamespace(a=1), Path("a")])
def test_checkpoint_with_objects_is_refused(
    value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save({"x": value}, tmp_path / "bad.pt")
    for forced in ("0", "1"):
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
        with pytest.raises(UsageError, match="refused, it holds more than tensors"):
            checkpoint_utils.load_checkpoint_to_cpu(path)


def test_fairseq_itself_would_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = save({"x": SimpleNamespace(a=1), "optimizer_history": [{}]}, tmp_path / "bad.pt")
    load = unrepaired(checkpoint_utils, "load_checkpoint_to_cpu")
    monkeypatch.setattr(checkpoint_utils, "_upgrade_state_dict", lambda state: state)
    assert load(path)["x"].a == 1


def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    whole = Path(save({"w": torch.ones(1000)}, tmp_path / "whole.pt")).read_bytes()
    cases = {"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2], "tail": whole[:-1]}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="truncated, or not a checkpoint"):
            compat.check_checkpoint(str(tmp_path / name))
    for nothing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="there is no such file"):
            compat.check_checkpoint(str(nothing))


# Precision.


@pytest.mark.parametrize("flag", ["fp16", "bf16", "amp"])
def test_half_precision_needs_a_gpu(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    common = SimpleNamespace(cpu=True, fp16=False, bf16=False, amp=False)
    compat.check_precision(common)
    setattr(common, flag, True)
    with pytest.raises(UsageError, match=f"--{flag}: needs a GPU"):
        compat.check_precision(common)
    common.cpu = False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"--{flag}: needs a GPU"):
        compat.check_precision(common)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compat.check_precision(common)


# Evaluation.


@pytest.fixture(scope="module")
def checkpoint(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at 16 tokens a sample."""
    folder = tmp_path_factory.mktemp("checkpoint")
    commands.train(data_bin, folder, "avgk")
    return folder / "checkpoint_last.pt"


@pytest.mark.parametrize(("asked", "split"), [("1024", "valid"), ("17", "test")])
def test_evaluation_at_the_context_of_the_model(
    asked: str, split: str, data_bin: Path, checkpoint: Path
) -> None:
    flags = ("--gen-subset", split, "--tokens-per-sample", asked)
    log = commands.apply("eval-lm", data_bin, checkpoint, *flags)
    assert f"--tokens-per-sample {asked}: the model has 16 positions; evaluating at 16" in log
    fitting = (*flags, "--tokens-per-sample", "16")
    expected = commands.apply("eval-lm", data_bin, checkpoint, *fitting)
    assert "evaluating at" not in expected
    assert commands.perplexity(log) == commands.perplexity(expected)


def test_shorter_evaluation_is_left_alone(data_bin: Path, checkpoint: Path) -> None:
    flags = ("--gen-subset", "valid", "--tokens-per-sample", "8")
    log = commands.apply("eval-lm", data_bin, checkpoint, *flags)
    assert "evaluating at" not in log and "valid 45 examples" in log


def test_context_window(data_bin: Path, checkpoint: Path) -> None:
    """Samples of 8 new tokens with 8 of context, asked for in two ways."""
    window = ("--gen-subset", "valid", "--context-window", "8")
    asked = commands.apply("eval-lm", data_bin, checkpoint, *window, "--tokens-per-sample", "16")
    cut = commands.apply("eval-lm", data_bin, checkpoint, *window, "--tokens-per-sample", "1024")
    assert commands.perplexity(asked) == commands.perplexity(cut)
    assert commands.perplexity(asked) != commands.evaluate(data_bin, checkpoint)


def test_fairseq_itself_would_evaluate_nothing(
    data_bin: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = unrepaired(LanguageModelingTask, "eval_lm_dataloader")
    monkeypatch.setattr(LanguageModelingTask, "eval_lm_dataloader", original)
    log = commands.apply("eval-lm", data_bin, checkpoint, "--tokens-per-sample", "1024")
    assert commands.perplexity(log) == 1.0


# Moving averages and finished runs.


def test_moving_average_copies_integers() -> None:
    model = torch.nn.BatchNorm1d(2)  # counts its batches in an integer
    config = SimpleNamespace(ema_decay=0.5, ema_seed_model=None, ema_fp32=False, ema_update_freq=1)
    config.ema_start_update = 0
    average = EMA(model, config)
    model.num_batches_tracked += 3
    with torch.no_grad():
        model.weight += 2
    average.step(model, updates=1)
    state = average.get_model().state_dict()
    assert state["num_batches_tracked"] == 3 and state["weight"].tolist() == [2, 2]


def test_fairseq_itself_would_train_a_finished_run(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--max-update", "1")
    commands.train(data_bin, tmp_path, "avgk", *flags)
    log = commands.train(data_bin, tmp_path, "avgk", *flags)
    assert "nothing to train: at update 1 of --max-update 1" in log and not commands.losses(log)
    monkeypatch.setattr(train_command, "train", unrepaired(train_command, "train"))
    assert list(commands.losses(commands.train(data_bin, tmp_path, "avgk", *flags))) == [2]
