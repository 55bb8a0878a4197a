"""A signal to one of several processes, or to their launcher, interrupts all of them together."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.expert_parallel import launch
from tests.expert_parallel.launch import final_state, logged

pytestmark = pytest.mark.usefixtures("quick_start")
PROGRAM = Path(__file__).parents[1] / "integration" / "interrupted.py"
UPDATES = 10
"""Number of updates. An epoch has eight in two processes."""
FLAGS = (
    *("--batch-size", "16", "--max-update", f"{UPDATES}", "--dropout", "0.1"),
    *("--no-epoch-checkpoints", "--required-batch-size-multiple", "1"),
)
KINDS: dict[str, tuple[str, ...]] = {
    "data parallel": (),
    "legacy": ("--ddp-backend", "legacy_ddp"),
    "expert parallel": ("--sffn-expert-parallel", "2"),
}


@pytest.fixture(scope="module")
def uninterrupted(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return kind of training -> its log and its final state."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    jobs = {
        kind: launch.training(data_bin, folder / "saved" / kind, "avgk", *FLAGS, *flags)
        for kind, flags in KINDS.items()
    }
    logs = launch.train(2, folder, jobs)
    return {kind: (logged(logs[kind]), final_state(folder / "saved" / kind)) for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "place", "update", "target"),
    [
        ("data parallel", "update", 3, "0"),
        ("data parallel", "update", 8, "parent"),
        ("data parallel", "validation", 8, "1"),
        ("legacy", "update", 9, "1"),
        ("expert parallel", "update", 3, "1"),
        ("expert parallel", "validation", 8, "0"),
        ("expert parallel", "update", 9, "parent"),
    ],
)
def test_one_signal_interrupts_all(
    kind: str,
    place: str,
    update: int,
    target: str,
    uninterrupted: dict[str, Any],
    data_bin: Path,
    tmp_path: Path,
) -> None:
    """Any process may get the signal; torchrun passes its own signal to all. Training then resumes
    as if it had never been interrupted."""
    save_dir = tmp_path / "saved"
    job = launch.training(data_bin, save_dir, "avgk", *FLAGS, *KINDS[kind])
    done = launch.run(2, PROGRAM, place, update, int(signal.SIGTERM), target, *job)
    assert done.returncode != 0
    assert "SIGKILL" not in done.stderr and "Connection closed" not in done.stderr
    if target != "parent":
        assert f"exitcode  : {128 + signal.SIGTERM}" in done.stderr
        # At least one rank notices the signal in this update.
        assert final_state(save_dir)["updates"] == update
    logs = launch.train(2, tmp_path / "resumed", {"job": job})
    saved = final_state(save_dir)
    resumed, (records, final) = logged(logs["job"]), uninterrupted[kind]
    assert resumed == {u: records[u] for u in resumed} and max(records) in resumed
    torch.testing.assert_close(saved, final, rtol=0, atol=0)


def run_by_hand(data: Path, save_dir: Path, number: int, target: str) -> list[tuple[int, str]]:
    """Start two ranks without a launcher, and return their exit statuses and errors."""
    job = launch.training(data, save_dir, "avgk", *FLAGS)
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", PROGRAM, "update", "3", str(int(number)), target),
                *(*job, "--distributed-world-size", "2", "--distributed-rank", str(rank)),
                *("--distributed-init-method", f"file://{save_dir.parent / 'meeting'}"),
                *("--distributed-no-spawn", "--distributed-backend", "gloo"),
            ],
            env={**launch.ENVIRONMENT, "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=launch.HANGS_SECONDS)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, said) for rank, said in zip(ranks, errors, strict=True)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_exit_status_of_processes_started_by_hand(
    number: int, data_bin: Path, tmp_path: Path
) -> None:
    """The status is 128 + n on every rank, whichever rank got the signal."""
    ended = run_by_hand(data_bin, tmp_path / "saved", number, "1")
    assert [status for status, _ in ended] == [128 + number] * 2, ended
    assert not any("Traceback" in said for _, said in ended)
    assert final_state(tmp_path / "saved")["updates"] == 3


@pytest.mark.parametrize("target", ["lost", "lost and unseen"])
def test_a_process_is_lost_after_a_signal(target: str, data_bin: Path, tmp_path: Path) -> None:
    """The other process ends with a line, even if the system does not report the loss."""
    (status, said), (lost, _) = run_by_hand(data_bin, tmp_path / "saved", signal.SIGTERM, target)
    assert (status, lost) == (128 + signal.SIGTERM, -signal.SIGKILL)
    lines = [line for line in said.splitlines() if line.startswith("SIGTERM: ")]
    assert len(lines) == 1 and "another process of the training has ended" in lines[0]
    assert "Traceback" not in said
