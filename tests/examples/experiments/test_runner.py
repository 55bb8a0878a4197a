"""The runner's use of processes and files, and the runs beside one that failed."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import progress, runner, training
from experiments.data import fingerprint
from experiments.files import Launcher
from experiments.plan import Run
from experiments.processes import last_json
from experiments.runner import Runner
from experiments.training import drop_optimizer
from tests.examples.experiments import made
from tests.examples.experiments.trial import Trial, trained


def test_json_after_other_lines() -> None:
    found = {"tasks": [{"a": 1}, {"b": {"c": 2}}]}
    for text in (json.dumps(found), json.dumps(found, indent=2)):
        assert last_json(f"a library was here\n{text}\n") == found


def test_only_the_last_model_is_kept(tmp_path: Path) -> None:
    last = tmp_path / "checkpoint_last.pt"
    state = {"model": {"w": torch.ones(2)}, "last_optimizer_state": {"m": torch.ones(9)}}
    for name in ("checkpoint_best.pt", "checkpoint_1_5.pt", last.name):
        torch.save(state, tmp_path / name)
    drop_optimizer(last)
    assert [path.name for path in tmp_path.glob("*")] == [last.name]
    kept = torch.load(last, weights_only=True)
    assert kept["last_optimizer_state"] is None and kept["model"]["w"].tolist() == [1, 1]


def test_the_fingerprint_is_of_all_texts(tmp_path: Path) -> None:
    paths = [tmp_path / "bin" / f"{split}.bin" for split in ("train", "valid", "test")]
    paths += [tmp_path / "domains" / name / "test.bin" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
        path.with_suffix(".idx").touch()
    dictionaries = [path.parent / "dict.txt" for path in paths[2:]]
    for path in dictionaries:
        path.write_text("word 3\n")
    folders = {"data": str(tmp_path / "bin"), "domains": str(tmp_path / "domains")}
    scale = made.scale(**folders, dictionary=5)  # fairseq has four more
    seen = {fingerprint(scale)}
    for path in paths:
        path.write_text("another")
        seen.add(fingerprint(scale))
    assert len(seen) == 1 + len(paths)
    with pytest.raises(SystemExit, match=r"dictionary 6 of scale made: .*dict\.txt has 5 types"):
        fingerprint(made.scale(**folders, dictionary=6))
    dictionaries[-1].write_text("drow 3\n")
    with pytest.raises(SystemExit, match=r"b/dict\.txt: is another dictionary than .*bin/dict"):
        fingerprint(scale)
    dictionaries[-1].unlink()
    with pytest.raises(SystemExit, match=r"b/dict\.txt: is missing"):
        fingerprint(scale)
    paths[-1].with_suffix(".idx").unlink()
    with pytest.raises(SystemExit, match=r"b/test\.idx: is missing"):
        fingerprint(scale)
    paths[-1].unlink()
    with pytest.raises(SystemExit, match=r"b/test\.bin: is missing"):
        fingerprint(scale)
    paths[-1].parent.rmdir()
    (tmp_path / "domains" / "a").rename(tmp_path / "domains" / "valid")
    with pytest.raises(SystemExit, match="domains/valid: valid is the name of a set in domain"):
        fingerprint(scale)
    with pytest.raises(SystemExit, match="none: there is no such folder"):
        fingerprint(made.scale(**{**folders, "domains": str(tmp_path / "none")}))


@pytest.mark.parametrize(("context", "tokens"), [(16, "8192"), (10000, "10000")])
def test_batches_of_evaluation_hold_a_whole_context(
    context: int, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tool(self: Runner, name: str, checkpoint: Path, *flags: str) -> dict[str, Any]:
        assert (name, flags[flags.index("--max-tokens") + 1]) == ("evaluate", tokens)
        return {"sets": {"data:valid": {"loss": 1.0}}}

    monkeypatch.setattr(Runner, "tool", tool)
    found = a_runner(tmp_path, tokens_per_sample=context).evaluate(tmp_path, sweep=True)
    assert found == {"evaluation": {"valid": {"loss": 1.0}}}


@pytest.mark.parametrize(("jobs", "threads"), [(1, "7"), (2, "3"), (9, "1")])
def test_trainings_share_the_cores(
    jobs: int, threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "cores", lambda: 7)
    out = tmp_path / "out"
    made_ = a_runner(tmp_path, jobs)
    with (tmp_path / "lock").open("w") as lock, out.open("w") as stdout:
        made_.locks[tmp_path] = lock.fileno()
        code = made_.call(["sh", "-c", "echo $OMP_NUM_THREADS"], tmp_path, stdout=stdout)
    assert (code, out.read_text()) == (0, f"{threads}\n")


def a_runner(folder: Path, jobs: int = 1, **changes: Any) -> Runner:
    results = made.empty(folder, domains="", **changes)
    return Runner(results.scale, Launcher(), results, folder, "abc", jobs)


def test_signals_are_passed_on_until_trainings_have_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that gets a second signal ends at once."""
    runner_, left = a_runner(tmp_path), [KeyboardInterrupt, KeyboardInterrupt]

    def wait(*_: object) -> None:
        if left:
            raise left.pop()

    class Child:
        pid, args = 12345, ["fairseq-train"]

    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(runner, "wait", wait)
    monkeypatch.setattr(runner.os, "killpg", lambda *call: sent.append(call))
    runner_.children.add(Child())  # type: ignore[arg-type]
    runner_.stop([])
    assert sent == [(12345, signal.SIGTERM)] * 3


def test_a_signal_does_not_go_to_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun would let Slurm kill the processes after half a minute. Slurm sends them the signal, if
    they belong to a job."""
    said = tmp_path / "said"
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    (tmp_path / "srun").write_text("#!/bin/sh\nexec sleep 60\n")
    for name in ("scancel", "srun"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    child = subprocess.Popen(["srun", "python"], text=True, start_new_session=True)
    runner.end(child)
    assert said.read_text() == "--signal TERM 7\n" and child.poll() is None
    monkeypatch.delenv("SLURM_JOB_ID")
    runner.end(child)
    assert child.wait(10) == -signal.SIGTERM


def test_the_others_go_on_after_a_training_that_failed(
    tmp_path: Path,
    data_bin: Path,
    calls: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The failure is reported in one line."""

    def fail(self: Runner, command: list[str], *args: Any, stdout: Any, **others: Any) -> int:
        if command[command.index("--seed") + 1 :][:1] != ["1"]:
            return call(self, command, *args, stdout=stdout, **others)
        stdout.write("Traceback\nOSError: no room\n\n")
        return 1

    call = Runner.call
    monkeypatch.setattr(Runner, "call", fail)
    trial = Trial(tmp_path, data_bin, '{ label = "a", model = "dense", seeds = [1, 2, 3] }')
    found = {"evaluation": {"valid": {"loss": 1.0}}, "routing": {}}
    monkeypatch.setattr(Runner, "evaluate", lambda *args: found)
    with pytest.raises(SystemExit) as stopped:
        trial.run()
    said = r"1 of 3 runs failed: (.*train\.log): training failed: OSError: no room"
    message = re.fullmatch(said, str(stopped.value))
    assert message and Path(message[1]).is_file()
    assert sorted(r["seed"] for r in trial.results().values()) == [2, 3]
    assert "failed: " in capsys.readouterr().out


def test_the_others_go_on_after_an_error_that_nobody_foresaw(
    tmp_path: Path, data_bin: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [OSError("no space left on device")]
    monkeypatch.setattr(
        training, "drop_optimizer", lambda checkpoint: full and (_ for _ in ()).throw(full.pop())
    )
    trial = Trial(tmp_path, data_bin, '{ label = "a", model = "dense", seeds = [1, 2] }')
    with pytest.raises(SystemExit, match=r"1 of 2 runs failed: OSError: no"):
        trial.run()
    assert [r["seed"] for r in trial.results().values()] == [2]
    trial.run()
    assert len(trial.results()) == trained(calls) == 2


def test_progress_counts_the_updates_of_active_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run is expected to take three times as long as the first."""
    bars = ""

    def train(self: Runner, run: Run, *_: object) -> None:
        nonlocal bars
        if run.model == "dense":
            return
        record = json.dumps({"num_updates": "20", "loss": "5.0"})
        log = self.folder(run) / "train.log"
        log.write_text(f"2026-11-29 12:00:00 | INFO | train_inner | {record}\n")
        for _ in range(1000):
            bars += capsys.readouterr().err
            if " 62% " in bars:
                break
            time.sleep(0.01)

    monkeypatch.setattr(Runner, "train_and_evaluate", train)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    runs = [Run(model, "", 1, 0.1, 40, 8) for model in ("dense", "switch")]
    stale = tmp_path / runs[1].key(made.scale(domains="")) / "train.log"
    stale.parent.mkdir()
    stale.write_text('x | INFO | train_inner | {"num_updates": "40"}\n')
    made_ = a_runner(tmp_path, relative_time={"switch": 3.0})
    with progress.Progress(runs, made_.scale, tmp_path) as shown:
        assert [shown.share(run, runs[:1], []) for run in runs] == [1.0, 0.0]
    made_.run(runs, sweep=False)
    bars += capsys.readouterr().err
    for percent, count in ((25, 1), (62, 1), (100, 2)):
        assert re.search(rf"{percent}% 00:\d\d, 00:\d\d left, {count}/2 runs", bars), bars


def test_two_commands_train_a_run_once(
    tmp_path: Path, data_bin: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second waits for the first, and uses its result."""
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    trial.run()
    ((key, result),) = trial.results().items()
    path = trial.folder / "results" / "small" / f"{key}.json"
    path.unlink()
    started = len(calls)
    with (trial.work / key / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def other() -> None:
            while "another command trains it; waiting" not in capsys.readouterr().out:
                time.sleep(0.1)
            path.write_text(json.dumps(result))
            fcntl.flock(lock, fcntl.LOCK_UN)

        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        trial.run()
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert len(calls) == started
