"""The counters of a training, in addition to its updates, continue after an interruption."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.optim import FairseqOptimizer
from fairseq.optim.dynamic_loss_scaler import DynamicLossScaler

from tests import commands
from tests.integration import interrupted

EPOCH = 7
"""Number of updates in an epoch at this batch size."""
FLAGS = ("--batch-size", "32", "--no-epoch-checkpoints")


def train(data: Path, save_dir: Path, updates: int, *flags: str) -> str:
    return commands.train(data, save_dir, "dense", *FLAGS, "--max-update", f"{updates}", *flags)


def rates(log: str) -> dict[int, str]:
    """Return update -> learning rate."""
    return {int(record["num_updates"]): record["lr"] for record in commands.records(log)}


def state_of(save_dir: Path) -> dict[str, Any]:
    return torch.load(save_dir / "checkpoint_last.pt", weights_only=True)


# No epoch is much better than the first one.
PLATEAU = (
    *("--lr-scheduler", "reduce_lr_on_plateau", "--lr", "1e-3", "--lr-patience", "1"),
    *("--lr-shrink", "0.5", "--lr-threshold", "0.5"),
)
NOTHING_LEARNT = ("--lr", "1e-12", "--dropout", "0", "--validate-interval-updates", "2")
LAST = 6 * EPOCH - 1


@pytest.fixture(scope="module")
def plateau(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Return update -> learning rate of a training that is not interrupted."""
    result = rates(train(data_bin, tmp_path_factory.mktemp("plateau"), LAST, *PLATEAU))
    assert len(set(result.values())) == 3  # it shrinks twice
    return result


@pytest.mark.parametrize("flags", [(), ("--no-save-optimizer-state",)])
@pytest.mark.parametrize(
    "stops",
    [(EPOCH,), (2 * EPOCH,), (2 * EPOCH + 3,), (3 * EPOCH, 4 * EPOCH), (EPOCH, 3 * EPOCH + 1)],
)
def test_plateaus(
    stops: tuple[int, ...],
    flags: tuple[str, ...],
    plateau: dict[int, str],
    data_bin: Path,
    tmp_path: Path,
) -> None:
    """Epochs without an improvement count, including the interrupted one. The rate itself continues
    too."""
    logged: dict[int, str] = {}
    for stop in (*stops, LAST):
        logged |= rates(train(data_bin, tmp_path, stop, *PLATEAU, *flags))
    assert logged == plateau


@pytest.mark.parametrize("flags", [(), ("--save-interval", "4")])
@pytest.mark.parametrize("update", [2 * EPOCH, 3 * EPOCH])
def test_plateaus_that_a_signal_interrupts(
    update: int,
    flags: tuple[str, ...],
    plateau: dict[int, str],
    data_bin: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This includes a validation whose epoch fairseq does not save."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted.at(patch, "update", update, lambda t: interrupted.send(t, signal.SIGTERM))
        train(data_bin, tmp_path, LAST, *PLATEAU, *flags)
    logged = rates(train(data_bin, tmp_path, LAST, *PLATEAU, *flags))
    assert logged == {u: rate for u, rate in plateau.items() if u > update}


def test_a_schedule_that_is_reset_begins_anew(data_bin: Path, tmp_path: Path) -> None:
    train(data_bin, tmp_path, 4 * EPOCH, *PLATEAU)
    kept = state_of(tmp_path)["optimizer_history"][-1]["lr_scheduler_state"]
    assert kept["num_bad_epochs"] == 0 and kept["lr"] == 5e-4
    train(data_bin, tmp_path, 4 * EPOCH + 1, *PLATEAU, "--reset-lr-scheduler")
    anew = state_of(tmp_path)["optimizer_history"][-1]["lr_scheduler_state"]
    assert anew["num_bad_epochs"] == 0 and anew["best"] == float("inf")


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("stop", [4, 6, EPOCH])
def test_moving_averages(stop: int, frequency: int, data_bin: Path, tmp_path: Path) -> None:
    flags = ("--store-ema", "--ema-decay", "0.5", "--ema-update-freq", f"{frequency}")
    train(data_bin, tmp_path / "whole", 10, *flags)
    train(data_bin, tmp_path / "parts", stop, *flags)
    train(data_bin, tmp_path / "parts", 10, *flags)
    whole, parts = (state_of(tmp_path / run)["extra_state"]["ema"] for run in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_averages_of_an_epoch_and_of_log_intervals(data_bin: Path, tmp_path: Path) -> None:
    """The interruption cuts a log interval and an epoch. Losses, gradients and routing are
    averaged."""
    interval = ("--log-interval", "3")

    def averages(log: str) -> list[dict[str, Any]]:
        timed = ("wps", "ups", "wall", "train_wall")
        found = commands.records(log) + commands.records(log, "train")
        return [
            {k: v for k, v in record.items() if not k.removeprefix("train_").startswith(timed)}
            for record in found
            if int(record.get("num_updates") or record["train_num_updates"]) > 4
        ]

    def run(folder: str, updates: int) -> str:
        words = (*FLAGS, *interval, "--max-update", f"{updates}")
        return commands.train(data_bin, tmp_path / folder, "avgk", *words)

    whole = averages(run("whole", 10))
    run("parts", 4)
    assert averages(run("parts", 10)) == whole


@pytest.mark.parametrize("kind", ["fp16", "amp"])
def test_loss_scale(
    kind: str, data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision, which needs a GPU, has a loss scaler. Here a training without it gets one."""

    def give_scaler() -> Any:
        scaler = (
            DynamicLossScaler(scale_window=2)
            if kind == "fp16"
            else torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=5)
        )
        monkeypatch.setattr(FairseqOptimizer, "scaler", scaler, raising=False)
        return scaler

    before = give_scaler()
    if kind == "fp16":
        for _ in range(4):
            before.update()
        assert before.loss_scale > 2.0**15
    else:
        before.load_state_dict({**before.state_dict(), "scale": 16.0, "_growth_tracker": 3})
    train(data_bin, tmp_path, 2)
    after, untouched = give_scaler(), give_scaler()
    monkeypatch.setattr(FairseqOptimizer, "scaler", after)
    train(data_bin, tmp_path, 3)
    state = vars if kind == "fp16" else torch.amp.GradScaler.state_dict
    assert state(after) == state(before) != state(untouched)
    monkeypatch.setattr(FairseqOptimizer, "scaler", untouched)
    fresh = dict(state(untouched))
    train(data_bin, tmp_path, 4, "--reset-optimizer")
    assert state(untouched) == fresh


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max-update", "3"), "at update 3 of --max-update 3"),
        (("--stop-time-hours", "1e-9"), "hours of --stop-time-hours 1e-09"),
        (
            (*NOTHING_LEARNT, "--patience", "2"),
            "after 2 validations without an improvement, of --patience 2",
        ),
    ],
)
def test_a_finished_training_stays_finished(
    flags: tuple[str, ...], said: str, data_bin: Path, tmp_path: Path
) -> None:
    train(data_bin, tmp_path, 40, *flags)
    before = state_of(tmp_path)["optimizer_history"][-1]["num_updates"]
    assert before < 40
    log = train(data_bin, tmp_path, 40, *flags)
    assert commands.losses(log) == {} and said in log
    assert state_of(tmp_path)["optimizer_history"][-1]["num_updates"] == before


def test_more_patience_goes_on(data_bin: Path, tmp_path: Path) -> None:
    flags = (*NOTHING_LEARNT, "--patience")
    assert max(commands.losses(train(data_bin, tmp_path, 40, *flags, "2"))) == 6
    assert max(commands.losses(train(data_bin, tmp_path, 40, *flags, "3"))) == 7
