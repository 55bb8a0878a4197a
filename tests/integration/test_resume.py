"""A training that stops, or is killed while it saves, resumes as if it had not stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import commands
from tests.commands import records

pytestmark = pytest.mark.usefixtures("quick_start")
EPOCH = 7
"""Number of updates in an epoch of the small corpus at this batch size."""
BATCH = ("--batch-size", "32")


def train(data: Path, save_dir: Path, model: str, updates: int, *flags: str) -> dict[int, Any]:
    """Train, and return update -> training log."""
    log = commands.train(data, save_dir, model, *BATCH, "--max-update", f"{updates}", *flags)
    keys = ("epoch", "loss", "gnorm", "lr", "wpb", "load_entropy", "balance_loss")
    return {
        int(record["num_updates"]): {key: record.get(key) for key in keys}
        for record in records(log)
    }


def final_state(save_dir: Path) -> dict[str, Any]:
    state = torch.load(save_dir / "checkpoint_last.pt", weights_only=True)
    return {
        "model": state["model"],
        "optimizer": state["last_optimizer_state"],
        "data": state["extra_state"]["train_iterator"],
        "updates": state["optimizer_history"][-1]["num_updates"],
    }


def assert_identical(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture(scope="module", params=["dense", "avgk", "base", "sigma_moe", "mixed"])
def uninterrupted(
    request: pytest.FixtureRequest, data_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[int, Any], dict[str, Any]]:
    """Train without a stop. Return model, log, and final checkpoint.

    Every model resumes within an epoch in ``test_resume_with_update_freq``, and every selector in
    ``test_translation.py``. These models differ where training stops: one without memories, one of
    each kind of choice, one that draws, and several methods in a model.
    """
    save_dir = tmp_path_factory.mktemp("uninterrupted")
    logged = train(data_bin, save_dir, request.param, 2 * EPOCH - 2)
    assert [record["epoch"] for record in logged.values()] == [1] * EPOCH + [2] * (EPOCH - 2)
    return request.param, logged, final_state(save_dir)


@pytest.mark.parametrize("stop", [3, EPOCH, EPOCH + 2])
def test_resumed_training_is_uninterrupted_training(
    uninterrupted: tuple[str, dict[int, Any], dict[str, Any]],
    stop: int,
    data_bin: Path,
    tmp_path: Path,
) -> None:
    """Training stops within an epoch, at its end, and in the next one. Dropout is on."""
    model, logged, final = uninterrupted
    first = train(data_bin, tmp_path, model, stop)
    second = train(data_bin, tmp_path, model, 2 * EPOCH - 2)
    assert list(second) == list(range(stop + 1, 2 * EPOCH - 1))
    assert first | second == logged
    assert_identical(final_state(tmp_path), final)


@pytest.mark.parametrize("model", [*commands.MODELS, "mixed"])
def test_resume_with_update_freq(model: str, data_bin: Path, tmp_path: Path) -> None:
    """Seven batches make four updates per epoch. The last update has one batch."""
    flags = ("--update-freq", "2", "--checkpoint-activations")
    whole = train(data_bin, tmp_path / "whole", model, 6, *flags)
    assert [record["epoch"] for record in whole.values()] == [1, 1, 1, 1, 2, 2]
    parts = train(data_bin, tmp_path / "parts", model, 3, *flags)
    parts |= train(data_bin, tmp_path / "parts", model, 6, *flags)
    assert parts == whole
    assert_identical(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


# BASE assigns the tokens of a micro-batch.
@pytest.mark.parametrize("model", [model for model in commands.MODELS if model != "base"])
def test_update_freq_is_a_larger_batch(model: str, data_bin: Path, tmp_path: Path) -> None:
    """fairseq groups consecutive batches, and with ``--curriculum`` they keep the order of the
    sentences. So batches 2i and 2i + 1 of 16 sentences are batch i of 32. Rounding leaves a
    difference below 1e-5 after six updates with SGD, as Adam would divide by tiny gradients."""
    flags = ("--curriculum", "1000000", "--dropout", "0", "--balance-loss-weight", "0")
    flags += ("--optimizer", "nag", "--momentum", "0", "--lr", "0.5")
    if model == "sigma_moe":  # each micro-batch leaves out other blocks
        flags += ("--sigma-moe-expert-dropout", "0")
    large = train(data_bin, tmp_path / "large", model, 6, *flags)
    halves = train(
        *(data_bin, tmp_path / "halves", model, 6, *flags),
        *("--batch-size", "16", "--update-freq", "2"),
    )
    for update, record in large.items():
        assert halves[update]["wpb"] == record["wpb"]
        assert float(halves[update]["loss"]) == pytest.approx(float(record["loss"]), abs=0.001)
    actual, expected = (final_state(tmp_path / run)["model"] for run in ("halves", "large"))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd"])
def test_resume_with_other_optimizers(optimizer: str, data_bin: Path, tmp_path: Path) -> None:
    """fairseq configures these optimizers, adadelta, adagrad and adamax by arguments, not by a
    dataclass."""
    train(data_bin, tmp_path, "avgk", 1, "--optimizer", optimizer)
    assert list(train(data_bin, tmp_path, "avgk", 2, "--optimizer", optimizer)) == [2]


def test_finished_run_trains_nothing(data_bin: Path, tmp_path: Path) -> None:
    train(data_bin, tmp_path, "avgk", 3)
    before = final_state(tmp_path)
    assert train(data_bin, tmp_path, "avgk", 3) == {}
    assert_identical(final_state(tmp_path), before)


# Killed while saving

KILLER = """
import io, os, shutil, signal, sys
import torch

stage, save = sys.argv.pop(1), int(sys.argv.pop(1))
saves = {"written": 0, "copied": 0}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def torch_save(obj, file, *args, **kwargs):
    saves["written"] += 1
    whole = io.BytesIO()
    original_save(obj, whole, *args, **kwargs)
    if stage == "writing" and saves["written"] == save:
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()
    file.write(whole.getvalue())

def copyfile(source, target, *args, **kwargs):
    saves["copied"] += "checkpoint_last" in str(target)
    if stage == "copying" and saves["copied"] == save:
        data = open(source, "rb").read()
        with open(target, "wb") as file:
            file.write(data[: len(data) // 2])
        die()
    return original_copyfile(source, target, *args, **kwargs)

def replace(source, target, *args, **kwargs):
    if stage == "renaming" and saves["written"] == save:
        die()
    if stage == "replacing" and "checkpoint_last" in str(target) and saves["copied"] == save:
        die()
    original_replace(source, target, *args, **kwargs)

original_save, torch.save = torch.save, torch_save
original_copyfile, shutil.copyfile = shutil.copyfile, copyfile
original_replace, os.replace = os.replace, replace
from fairseq_cli.train import cli_main
cli_main()
"""
"""Program that runs fairseq-train and kills it at one stage of the n-th save: in the middle of
writing the first file, before its renaming, in the middle of copying it, or before the copy's
renaming."""

SAVING = ("--save-interval-updates", "2", "--dropout", "0.1")


@pytest.fixture(scope="module")
def not_killed(
    data_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[int, Any], dict[str, Any]]:
    save_dir = tmp_path_factory.mktemp("not_killed")
    return train(data_bin, save_dir, "avgk", 6, *SAVING), final_state(save_dir)


@pytest.mark.parametrize("stage", ["writing", "renaming", "copying", "replacing"])
def test_killed_while_saving(
    stage: str,
    not_killed: tuple[dict[int, Any], dict[str, Any]],
    data_bin: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second save, of update 4, is cut short. Training resumes from update 2, or from update 4
    if only the copy to ``checkpoint_last.pt`` is missing."""
    with monkeypatch.context() as patch:
        command: list[str] = []
        patch.setattr(commands, "run", lambda *words: command.extend(map(str, words[1:])) or "")
        train(data_bin, tmp_path, "avgk", 6, *SAVING)
    process = subprocess.run(
        [sys.executable, "-c", KILLER, stage, "2", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    assert final_state(tmp_path)["updates"] == 2
    logged, final = not_killed
    resumed = train(data_bin, tmp_path, "avgk", 6, *SAVING)
    left = (3, 4, 5, 6) if stage in ("writing", "renaming") else (5, 6)
    assert resumed == {update: logged[update] for update in left}
    assert_identical(final_state(tmp_path), final)
