"""Each repair of fairseq, with what breaks without it."""

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.models.ema.ema import EMA
from fairseq.trainer import Trainer
from fairseq_cli import train as train_command

from fairseq_sffn import compat
from tests import commands

REPAIRED = [(Trainer, "__init__"), (train_command, "train"), (EMA, "__init__")]


def unrepaired(owner: Any, name: str) -> Any:
    """fairseq's own function."""
    return inspect.unwrap(getattr(owner, name))


def test_applying_twice_changes_nothing() -> None:
    before = [getattr(owner, name) for owner, name in REPAIRED]
    compat.apply()
    importlib.reload(compat).apply()
    assert [getattr(owner, name) for owner, name in REPAIRED] == before


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
