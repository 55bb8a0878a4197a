"""One of several processes fails, or differs from the others."""

from pathlib import Path
from typing import Any

import pytest

from tests import commands
from tests.expert_parallel import launch

pytestmark = pytest.mark.usefixtures("quick_start")
FLAGS = (
    *launch.SAME_SENTENCES,
    *("--batch-size", "8", "--required-batch-size-multiple", "1", "--max-update", "6"),
    *("--save-interval-updates", "2", "--no-epoch-checkpoints", "--keep-interval-updates", "1"),
)
SHARED = ("--sffn-expert-parallel", "2")


def run(data: Path, save_dir: Path, fault: str, rank: int, *flags: str) -> Any:
    """Run two processes to their end, which must come long before a collective operation times
    out."""
    arguments = launch.training(data, save_dir, "avgk", *FLAGS, *flags)
    return launch.run(2, launch.HERE / "faulty_worker.py", fault, rank, *arguments)


@pytest.fixture(scope="module")
def healthy(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Train without a fault and return update -> loss."""
    folder = tmp_path_factory.mktemp("healthy")
    job = launch.training(data_bin, folder / "saved", "avgk", *FLAGS, *SHARED)
    return commands.losses(launch.train(2, folder, {"job": job})["job"])


@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        ("killed", 0),
        ("killed", 1),
        ("killed saving a part", 0),
        ("killed saving a part", 1),
        ("killed saving the file", 0),
    ],
)
def test_a_process_that_is_killed(fault, rank, healthy, data_bin, tmp_path):
    """The job stops and names the killed process. No half-written file has a checkpoint's name.
    Training resumes from the last checkpoint, of update 2, and ends as if nothing had happened."""
    save_dir = tmp_path / "saved"
    done = run(data_bin, save_dir, fault, rank, *SHARED)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    assert f"rank      : {rank}" in done.stderr
    assert commands.evaluate(data_bin, save_dir / "checkpoint_last.pt") > 1
    job = launch.training(data_bin, save_dir, "avgk", *FLAGS, *SHARED)
    resumed = commands.losses(launch.train(2, tmp_path / "jobs", {"job": job})["job"])
    assert resumed == {update: healthy[update] for update in (3, 4, 5, 6)}
    assert len(list(save_dir.glob("shards-*"))) == 1  # the rest of the other checkpoint is gone


@pytest.mark.parametrize(
    ("fault", "rank"),
    [("no room for a part", 0), ("no room for a part", 1), ("no room for the file", 0)],
)
def test_full_disk(fault, rank, healthy, data_bin, tmp_path):
    """One rank prints one line. Nothing of the failed checkpoint stays, and training resumes from
    the one before."""
    save_dir = tmp_path / "saved"
    done = run(data_bin, save_dir, fault, rank, *SHARED)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "No space left on device" in line]
    assert "not written: No space left on device; it takes " in line
    assert "fairseq/trainer.py" not in done.stderr
    assert len(list(save_dir.glob("shards-*"))) == 1 and not list(save_dir.glob("**/*.tmp"))
    job = launch.training(data_bin, save_dir, "avgk", *FLAGS, *SHARED)
    resumed = commands.losses(launch.train(2, tmp_path / "jobs", {"job": job})["job"])
    assert resumed == {update: healthy[update] for update in (3, 4, 5, 6)}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("other flags", "--lr is [0.01] on rank 0 and [0.5] on rank 1"),
        ("other flags by another way", "--lr is [0.01] on rank 0 and [0.5] on rank 1"),
        ("other code", "fairseq_sffn's code is"),
    ],
)
def test_processes_that_differ_do_not_start(fault, message, data_bin, tmp_path):
    done = run(data_bin, tmp_path / "saved", fault, 1)
    assert done.returncode != 0
    assert message in done.stderr and "same flags and the same code" in done.stderr
    assert "train_inner" not in done.stdout + done.stderr


@pytest.mark.parametrize("flags", [(), SHARED])
def test_a_process_that_is_out_of_memory(flags, data_bin, tmp_path):
    """It ends the job. fairseq would skip the micro-batch, and the other rank would wait for it."""
    done = run(data_bin, tmp_path / "saved", "out of memory", 1, *flags)
    assert done.returncode != 0
    assert "RuntimeError: out of memory" in done.stderr


@pytest.mark.parametrize("flags", [("--ddp-backend", "legacy_ddp"), (), SHARED])
def test_gradients_that_differ_are_found_on_a_cpu_too(flags, data_bin, tmp_path):
    done = run(data_bin, tmp_path / "saved", "diverged", 1, *flags)
    assert done.returncode != 0
    assert "gradients are inconsistent between workers" in done.stderr
