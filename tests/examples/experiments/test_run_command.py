"""``experiments run`` in processes of its own, from data to results."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.training import updates_of
from tests import commands
from tests.examples.experiments.trial import UPDATES, Trial

pytestmark = pytest.mark.usefixtures("quick_start")
EXPERIMENTS = commands.ROOT / "examples" / "experiments"


def test_trains_evaluates_and_does_nothing_twice(
    tmp_path: Path, data_bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is a process."""
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense", seeds = [2] }')
    trial.run()
    ((key, result),) = trial.results().items()
    assert (result["model"], result["seed"], result["lr"]) == ("dense", 2, 0.01)
    assert key.startswith("dense-")
    assert list(result["evaluation"]) == ["valid", "test", "law"]
    assert result["evaluation"]["test"] == result["evaluation"]["law"]  # the same text
    assert 1 < result["evaluation"]["test"]["perplexity"] < 100
    assert [r["update"] for r in result["training"]["train"]] == list(range(1, UPDATES + 1))
    assert result["training"]["tokens_per_second"] > 0
    assert result["routing"] == {} and "fairseq-train" in result["command"]
    state = torch.load(trial.work / key / "checkpoints" / "checkpoint_last.pt", weights_only=True)
    assert state["last_optimizer_state"] is None

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    trial.run()
    assert trial.results() == {key: result}


@contextlib.contextmanager
def training(trial: Trial, logged: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start the command, and wait until the training has logged a text."""
    files = (str(trial.table), "--scale", str(trial.scale), "--work", str(trial.folder / "work"))
    command = [sys.executable, "-W", "ignore", str(EXPERIMENTS), "run", *files]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        for _ in range(3000):
            if any(logged in log.read_text() for log in trial.work.glob("*/train.log")):
                break
            time.sleep(0.02)
        yield run


@pytest.fixture
def long(tmp_path: Path, data_bin: Path) -> Trial:
    return Trial(tmp_path, data_bin, '{ label = "dense", model = "dense", length = 10000 }')


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_trainings_end_with_the_command(
    number: signal.Signals, tmp_path: Path, data_bin: Path
) -> None:
    """Trainings finish an update and save, and the same command resumes them."""
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense", length = 50 }')
    with training(trial, "| train_inner |") as run:
        assert trainings(trial.work)
        run.send_signal(number)
        assert run.wait(timeout=600) != 0
    assert not trainings(trial.work)
    (log,) = trial.work.glob("*/train.log")
    ended = re.findall(r"SIGTERM: the training ends at update (\d+)", log.read_text())
    assert ended == [str(updates_of(log.parent / "checkpoints" / "checkpoint_last.pt"))]


def test_a_training_that_outlives_a_killed_command_is_waited_for(long: Trial) -> None:
    with training(long, "| train |") as run:
        run.kill()
    (process,) = trainings(long.work)
    (lock,) = long.work.glob("*/lock")
    with lock.open("a") as file:
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.kill(int(process), signal.SIGKILL)
        fcntl.flock(file, fcntl.LOCK_EX)  # free as soon as the training has ended


def trainings(work: Path) -> list[str]:
    """Return the processes that write to a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has just ended
            words = path.read_bytes().decode().split("\0")
            if f"{work}/" in "".join(words) and "fairseq_cli.train" in words:
                found.append(path.parent.name)
    return found
