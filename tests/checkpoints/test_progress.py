"""The counters of a training survive an interruption, and do not leak into another training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_cli import train as train_command

from tests import commands

# The model learns nothing, so no validation is better than the first one.
PATIENCE = (
    *("--patience", "4", "--lr", "1e-12", "--dropout", "0", "--validate-interval-updates", "2"),
    *("--save-interval-updates", "2", "--max-update", "40", "--no-epoch-checkpoints"),
)


def updates(log: str) -> list[int]:
    return list(commands.losses(log))


@pytest.mark.parametrize("stops", [(), (4,), (2, 6), (2, 4, 6, 8)])
def test_patience_counts_on(stops: tuple[int, ...], data_bin: Path, tmp_path: Path) -> None:
    """Training ends at the same update, however often it was interrupted."""
    trained: list[int] = []
    for stop in (*stops, 40):
        flags = (*PATIENCE, "--max-update", f"{stop}")
        trained += updates(commands.train(data_bin, tmp_path, "avgk", *flags))
    assert trained == list(range(1, 11))


@pytest.mark.parametrize("flags", [("--reset-meters",), ("--reset-optimizer", "--reset-meters")])
def test_patience_begins_anew_where_asked(
    flags: tuple[str, ...], data_bin: Path, tmp_path: Path
) -> None:
    commands.train(data_bin, tmp_path, "avgk", *PATIENCE, "--max-update", "6")
    log = commands.train(data_bin, tmp_path, "avgk", *PATIENCE, *flags)
    assert len(updates(log)) == 10


def test_trainings_of_one_process_do_not_share_their_best(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep of hydra runs several trainings in one process."""
    first = commands.train(data_bin, tmp_path / "first", "avgk", *PATIENCE)
    monkeypatch.setattr(train_command.should_stop_early, "best", -1.0, raising=False)
    monkeypatch.setattr(train_command.should_stop_early, "num_runs", 3, raising=False)
    monkeypatch.setattr(checkpoint_utils.save_checkpoint, "best", -1.0, raising=False)
    second = commands.train(data_bin, tmp_path / "second", "avgk", *PATIENCE)
    assert updates(first) == updates(second) == list(range(1, 11))
    assert (tmp_path / "second" / "checkpoint_best.pt").is_file()


# Flags that leave the optimizer's state out of a checkpoint.

BARE = ("--no-save-optimizer-state", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "4")


def test_a_finished_training_stays_finished(data_bin: Path, tmp_path: Path) -> None:
    commands.train(data_bin, tmp_path, "avgk", *BARE, "--max-update", "3")
    log = commands.train(data_bin, tmp_path, "avgk", *BARE, "--max-update", "3")
    assert updates(log) == [] and "nothing to train: at update 3" in log


def test_an_interrupted_training_goes_on(data_bin: Path, tmp_path: Path) -> None:
    """Its schedule, its position in the data and its best loss continue."""

    def learning_rates(log: str) -> dict[int, Any]:
        return {int(r["num_updates"]): r["lr"] for r in commands.records(log)}

    whole = commands.train(data_bin, tmp_path / "whole", "avgk", *BARE, "--max-update", "6")
    commands.train(data_bin, tmp_path, "avgk", *BARE, "--max-update", "3")
    saved = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    log = commands.train(data_bin, tmp_path, "avgk", *BARE, "--max-update", "6")
    assert "has no optimizer state; training goes on at update 3, and the optimizer" in log
    expected = learning_rates(whole)
    assert learning_rates(log) == {update: expected[update] for update in (4, 5, 6)}
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert state["extra_state"]["best"] <= saved["extra_state"]["best"]
    assert state["extra_state"]["train_iterator"]["iterations_in_epoch"] == 6


@pytest.mark.parametrize(
    "flags",
    [
        ("--reset-optimizer", "--restore-file", "LAST"),
        ("--finetune-from-model", "LAST"),
    ],
)
def test_beginning_anew_on_purpose(flags: tuple[str, ...], data_bin: Path, tmp_path: Path) -> None:
    commands.train(data_bin, tmp_path, "avgk", *BARE, "--max-update", "3")
    flags = tuple(word.replace("LAST", str(tmp_path / "checkpoint_last.pt")) for word in flags)
    log = commands.train(data_bin, tmp_path / "new", "avgk", *BARE, *flags, "--max-update", "2")
    assert updates(log) == [1, 2]
