"""A training that a signal interrupts saves, ends with 128 + n, and resumes as if it had not
stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import commands
from tests.integration import interrupted

pytestmark = pytest.mark.usefixtures("quick_start")
HERE = Path(__file__).parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
UPDATES = 10
"""Number of updates. An epoch has seven."""
FLAGS = ("--batch-size", "32", "--max-update", f"{UPDATES}", "--dropout", "0.1")
TRAININGS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "saving every second update": ("--save-interval-updates", "2"),
    "validating every second update": ("--validate-interval-updates", "2"),
    "saving every second epoch": ("--save-interval", "2"),
    "without validation": ("--disable-validation",),
    "with accumulation": ("--update-freq", "2"),
    "without checkpoints of epochs": ("--no-epoch-checkpoints", "--keep-best-checkpoints", "1"),
}
PLACES = [
    (kind, "update", update)
    for kind in TRAININGS
    for update in ((2, 4, 5) if "accum" in kind else (3, 7, 8))
] + [
    ("plain", "update", UPDATES),
    ("plain", "validation", 7),
    ("plain", "save", 7),
    ("saving every second update", "validation", 4),
    ("saving every second update", "save", 4),
    ("validating every second update", "validation", 4),
]


def train(data: Path, save_dir: Path, *flags: str) -> dict[int, Any]:
    """Train, and return update -> training log."""
    return logged(commands.train(data, save_dir, "avgk", *FLAGS, *flags))


def logged(log: str) -> dict[int, Any]:
    keys = ("epoch", "loss", "gnorm", "lr", "wpb", "load_entropy")
    return {
        int(record["num_updates"]): {key: record.get(key) for key in keys}
        for record in commands.records(log)
    }


def final_state(save_dir: Path) -> dict[str, Any]:
    state = torch.load(save_dir / "checkpoint_last.pt", weights_only=True)
    return {
        "model": state["model"],
        "optimizer": state["last_optimizer_state"],
        "data": state["extra_state"]["train_iterator"],
        "updates": state["optimizer_history"][-1]["num_updates"],
        "best": state["extra_state"].get("best"),
        "files": sorted(path.name for path in save_dir.iterdir()),
    }


def assert_identical(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if key in ("model", "optimizer"):
            torch.testing.assert_close(actual[key], value, rtol=0, atol=0)
        else:
            assert actual[key] == value


def updates(save_dir: Path) -> int:
    return final_state(save_dir)["updates"]


def run_interrupted(data: Path, save_dir: Path, *flags: str, status: int) -> None:
    with pytest.raises(SystemExit) as ended:
        train(data, save_dir, *flags)
    assert ended.value.code == status


@pytest.fixture(scope="module")
def uninterrupted(
    data_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[int, Any], dict[str, Any]]]:
    """Return training -> its log and its final state."""
    result = {}
    for name, flags in TRAININGS.items():
        save_dir = tmp_path_factory.mktemp("uninterrupted")
        result[name] = train(data_bin, save_dir, *flags), final_state(save_dir)
    return result


@pytest.mark.parametrize(("kind", "place", "update"), PLACES)
def test_interrupted_training_goes_on(
    kind: str,
    place: str,
    update: int,
    uninterrupted: dict[str, Any],
    data_bin: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The signal comes within an epoch, at its end and in the next one, at the last update, during
    validation, and during a save. No update is lost, and none is made after the signal."""
    with monkeypatch.context() as patch:
        interrupted.at(patch, place, update, lambda t: interrupted.send(t, signal.SIGTERM))
        run_interrupted(data_bin, tmp_path, *TRAININGS[kind], status=128 + signal.SIGTERM)
    assert updates(tmp_path) == update
    resumed = train(data_bin, tmp_path, *TRAININGS[kind])
    records, final = uninterrupted[kind]
    assert resumed == {u: record for u, record in records.items() if u > update}
    assert_identical(final_state(tmp_path), final)


def test_a_signal_between_two_epochs(
    uninterrupted: dict[str, Any],
    data_bin: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits for the next epoch's first update, so the epoch that was not saved is not lost."""
    kind = "saving every second epoch"
    with monkeypatch.context() as patch:
        interrupted.at(patch, "next epoch", 7, lambda t: interrupted.send(t, signal.SIGTERM))
        run_interrupted(data_bin, tmp_path, *TRAININGS[kind], status=128 + signal.SIGTERM)
    assert updates(tmp_path) == 8
    resumed = train(data_bin, tmp_path, *TRAININGS[kind])
    records, final = uninterrupted[kind]
    assert resumed == {u: record for u, record in records.items() if u > 8}
    assert_identical(final_state(tmp_path), final)


LOW_RATE = ("--force-anneal", "1", "--lr-shrink", "0.1", "--stop-min-lr", "2e-3")


def fail(*_: Any) -> None:
    raise RuntimeError("the next epoch has no data")


@pytest.mark.parametrize("flags", [("--max-epoch", "2"), LOW_RATE, None])
def test_handlers_after_the_last_epoch(
    flags: tuple[str, ...] | None, data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an error between two epochs, signals do what they did before the training."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    if flags is None:
        interrupted.at(monkeypatch, "next epoch", 7, fail)
        with pytest.raises(RuntimeError, match="no data"):
            train(data_bin, tmp_path)
    else:
        assert 7 in train(data_bin, tmp_path, "--max-update", "100", *flags)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("command", ["train", "hydra_train"])
def test_every_signal(
    number: int,
    command: str,
    data_bin: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    interrupted.at(monkeypatch, "update", 2, lambda t: interrupted.send(t, number))
    with pytest.raises(SystemExit) as ended:
        if command == "train":
            train(data_bin, tmp_path)
        else:
            sizes = ("task.tokens_per_sample=16", "dataset.batch_size=8")
            commands.hydra_train(data_bin, tmp_path, "optimization.max_update=4", *sizes)
    assert ended.value.code == 128 + number
    assert updates(tmp_path) == 2
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


@pytest.mark.parametrize("place", ["update", "validation"])
def test_saved_before_validation_ends(
    place: str, data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that does not wait for the validation loses no update."""
    saved: list[int] = []
    interrupted.at(monkeypatch, place, 7, lambda t: interrupted.send(t, signal.SIGTERM))
    interrupted.at(monkeypatch, "validated", 7, lambda _: saved.append(updates(tmp_path)))
    batches = ("--batch-size-valid", "8")  # several batches, so that one comes after the signal
    run_interrupted(data_bin, tmp_path, *batches, status=128 + signal.SIGTERM)
    assert saved == [7]


@pytest.mark.parametrize("flag", ["--no-save", "--no-last-checkpoints"])
def test_warns_where_nothing_is_saved(
    flag: str,
    data_bin: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    interrupted.at(monkeypatch, "update", 3, lambda t: interrupted.send(t, signal.SIGTERM))
    run_interrupted(data_bin, tmp_path, flag, status=128 + signal.SIGTERM)
    assert f"SIGTERM: {flag}: update 3 is not saved" in caplog.text


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_signals_of_the_caller_stay_the_callers(
    handler: Any, data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        interrupted.at(monkeypatch, "update", 2, lambda _: os.kill(os.getpid(), signal.SIGUSR1))
        assert list(train(data_bin, tmp_path, "--max-update", "3")) == [1, 2, 3]
        assert signal.getsignal(signal.SIGUSR1) == handler
    finally:
        signal.signal(signal.SIGUSR1, before)


def program(data: Path, save_dir: Path, target: str, *flags: str) -> Any:
    """Run a process that gets a signal in its second update, and return how it ended."""
    words: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "run", lambda *given: words.extend(map(str, given[1:])) or "")
        train(data, save_dir, *flags)
    return subprocess.run(
        [sys.executable, HERE / "interrupted.py", "update", "2", "15", target, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("buffer", ["10", "0"])
def test_a_signal_to_the_whole_group(buffer: str, data_bin: Path, tmp_path: Path) -> None:
    """Processes that load data survive the signal until the update has its batches. The training
    gets the signal twice: by itself and from ``timeout``."""
    flags = ("--num-workers", "1", "--data-buffer-size", buffer, "--batch-size", "4")
    done = program(data_bin, tmp_path, "group", *flags)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert 2 <= updates(tmp_path) < UPDATES


def test_a_second_signal_ends_at_once(data_bin: Path, tmp_path: Path) -> None:
    """It also ends while the main thread is waiting."""
    done = program(data_bin, tmp_path, "twice")
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.endswith("SIGTERM: this is the second signal; ends without saving\n")
    assert not (tmp_path / "checkpoint_last.pt").exists()


def test_nothing_is_received_outside_the_main_thread(data_bin: Path, tmp_path: Path) -> None:
    """Python sets handlers in the main thread only."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        records = pool.submit(train, data_bin, tmp_path, "--max-update", "2").result()
    assert list(records) == [1, 2]
