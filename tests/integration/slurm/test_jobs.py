"""The page's batch script under Slurm: at the time limit, and when a job is requeued, a training
saves, starts again, and ends as if it had not stopped."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.expert_parallel import launch
from tests.expert_parallel.launch import final_state, logged
from tests.integration.slurm import documented
from tests.integration.slurm.cluster import Cluster, call, free_ports, text
from tests.test_documents import DOCUMENTS, ROOT

pytestmark = pytest.mark.usefixtures("quick_start")
HELD = Path(__file__).parent / "held.py"
SLURM = re.compile(r"\b(srun|sbatch|SBATCH) ")
UPDATE, UPDATES = 3, 10
"""Update after which the training waits for a signal, and the last one. An epoch of two processes
has eight."""
FLAGS = (
    *("--batch-size", "16", "--max-update", f"{UPDATES}", "--dropout", "0.1"),
    *("--no-epoch-checkpoints", "--required-batch-size-multiple", "1"),
)
SHARDED = (*FLAGS, "--sffn-expert-parallel", "2")
ONE_GPU, ONE_NODE, ALL_NODES = range(3)
"""Places of the page's lines that submit the script."""


@dataclass
class Job:
    """A job of the cluster, and its files."""

    cluster: Cluster
    number: str
    log: Path
    save_dir: Path

    def wait_for(self, words: str, count: int = 1) -> None:
        """Wait until the log has some words so many times, once for each process."""
        self.cluster.wait_until(lambda: text(self.log).count(words) >= count, self.log)

    def end(self) -> tuple[dict[int, Any], dict[str, Any]]:
        """Wait for the end, and return the log's records and the final state."""
        assert self.cluster.wait(self.number, self.log) == "COMPLETED", text(self.log)
        return logged(self.log.read_text()), final_state(self.save_dir)


@pytest.fixture(scope="module")
def jobs(
    cluster: Cluster, data_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int, Job]]:
    """Submit each of the page's lines."""
    folder, made = tmp_path_factory.mktemp("jobs"), {}
    sharded, limit = ("--gpus-per-node", "2"), ("--time", "2", "--signal", "B:USR1@60")
    for place, extra in ((ALL_NODES, limit), (ONE_NODE, sharded), (ONE_GPU, ())):
        save_dir, log = folder / f"saved{place}", folder / f"log{place}"
        flags = FLAGS if place == ONE_GPU else SHARDED
        arguments = launch.training(data_bin, save_dir, "avgk", *flags)
        script = documented.on_cpus(documented.batch_script(), free_ports(1)[0])
        script = documented.with_training(script, (HELD, UPDATE), arguments)
        line = documented.on_cpus(" ".join(documented.submissions()[place]), 0)
        number = cluster.submit(script, *line.split(), *extra, log=log)
        made[place] = Job(cluster, number, log, save_dir)
    yield made


@pytest.fixture(scope="module")
def uninterrupted(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Return number of processes -> log and final state."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = {}
    for processes, flags in ((1, FLAGS), (2, SHARDED)):
        save_dir = folder / f"saved{processes}"
        job = launch.training(data_bin, save_dir, "avgk", *flags)
        log = launch.train(processes, folder / f"{processes}", {"job": job})["job"]
        result[processes] = logged(log), final_state(save_dir)
    return result


@pytest.mark.parametrize("document", DOCUMENTS)
def test_all_lines_for_slurm_are_submitted(document: str) -> None:
    """Blocks for Slurm are in the page only, of which the tests below submit every line."""
    found = [block for block in documented.blocks(ROOT / document) if SLURM.search(block)]
    assert len(found) == (2 if ROOT / document == documented.PAGE else 0)


def assert_resumed(job: Job, expected: tuple[dict[int, Any], dict[str, Any]]) -> None:
    """Check that a training has saved after ``UPDATE``, gone on, and ended like another one."""
    records, state = job.end()
    assert job.log.read_text().count(f"the training ends at update {UPDATE}") == 1
    assert records == expected[0] and list(records) == [*range(1, UPDATES + 1)]
    torch.testing.assert_close(state, expected[1], rtol=0, atol=0)


@pytest.mark.parametrize(("place", "processes"), [(ONE_GPU, 1), (ONE_NODE, 2)])
def test_a_requeued_job(
    place: int, processes: int, jobs: dict[int, Job], uninterrupted: dict[int, Any]
) -> None:
    """The page's lines that put a job back into the queue."""
    line = documented.requeues()[place]
    jobs[place].wait_for("waits for a signal", processes)
    call(*shlex.split(line.replace("JOB", jobs[place].number)))
    assert_resumed(jobs[place], uninterrupted[processes])


def test_a_time_limit_on_two_nodes(jobs: dict[int, Job], uninterrupted: dict[int, Any]) -> None:
    """Slurm looks at time limits every 30 seconds. Therefore this test comes last."""
    assert_resumed(jobs[ALL_NODES], uninterrupted[2])
