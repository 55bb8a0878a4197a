"""A finished training does not continue."""

import inspect
from pathlib import Path

import pytest
from fairseq_cli import train as train_command

from tests import commands


def test_fairseq_itself_would_train_a_finished_run(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--max-update", "1")
    commands.train(data_bin, tmp_path, "avgk", *flags)
    log = commands.train(data_bin, tmp_path, "avgk", *flags)
    assert "nothing to train: at update 1 of --max-update 1" in log and not commands.losses(log)
    monkeypatch.setattr(train_command, "train", inspect.unwrap(train_command.train))
    assert list(commands.losses(commands.train(data_bin, tmp_path, "avgk", *flags))) == [2]
