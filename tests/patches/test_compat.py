"""Each repair of fairseq, with what breaks without it."""

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.data import TokenBlockDataset, data_utils
from fairseq.models.ema.ema import EMA
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.trainer import Trainer
from fairseq_cli import eval_lm as eval_command
from fairseq_cli import generate as generate_command
from fairseq_cli import train as train_command

from fairseq_sffn import compat
from tests import commands

REPAIRED = [
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
    monkeypatch.setattr(data_utils, "batch_by_size", unrepaired(data_utils, "batch_by_size"))
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


def test_a_command_run_as_a_module_is_repaired_too(monkeypatch):
    """``python -m fairseq_cli.eval_lm`` runs another copy of the module."""
    copy, other = ModuleType("__main__"), ModuleType("__main__")
    copy.__spec__, other.__spec__ = eval_command.__spec__, generate_command.__spec__

    def repaired() -> None:
        pass

    for command in (other, copy):
        monkeypatch.setitem(sys.modules, "__main__", command)
        repaired.sffn_repairs = ()
        monkeypatch.setattr(eval_command, "cli_main", lambda: None)
        compat.replace_once(eval_command, "cli_main", repaired)
    assert copy.cli_main is eval_command.cli_main is repaired
    assert not hasattr(other, "cli_main")
