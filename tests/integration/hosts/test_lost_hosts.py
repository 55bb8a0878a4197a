"""A host vanishes: the other one names it in time, or goes on from the last checkpoint."""

import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests import commands
from tests.expert_parallel import launch
from tests.integration.hosts.jobs import ENDLESS, FLAGS, TRAIN, Job, losses
from tests.integration.hosts.network import HERE, Host

SECONDS = 10
"""``--peer-timeout``."""
ENDING_SECONDS = 60
"""Longest time until the launcher of the other host ends. Its own waiting comes on top of ours."""
STORE = (
    "from torch.distributed import TCPStore; import time; "
    "store = TCPStore('0.0.0.0', 29500, is_master=True, wait_for_workers=False); time.sleep(1e9)"
)
"""Program with the store where launchers meet, as in the documents."""
RANKS = ("0, 1", "2, 3")


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", ["killed", "unplugged"])
def test_the_other_host_names_a_lost_one(
    how: str, lost: int, hosts: list[Host], data_bin: Path, tmp_path: Path
) -> None:
    """The collective operations alone would wait for half an hour. The launchers' store is on the
    first host. Without it, the other launcher ends when TCP gives up."""
    for host in hosts:
        host.run("echo 6 > /proc/sys/net/ipv4/tcp_retries2")
    arguments = launch.training(
        *(data_bin, tmp_path / "saved", "avgk", *FLAGS, *ENDLESS, "--no-save"),
        *("--sffn-expert-parallel", "4", "--peer-timeout", str(SECONDS)),
    )
    job = Job(tmp_path, hosts, TRAIN, *arguments)
    job.wait_until(lambda: 3 in losses(job.said(hosts[0])))
    gone, left = hosts[lost], hosts[1 - lost]
    since = time.monotonic()
    gone.kill() if how == "killed" else gone.pull_cable()
    assert job.wait(left, ENDING_SECONDS) != 0
    took = time.monotonic() - since
    said = job.said(left)
    (line,) = [line for line in said.splitlines() if gone.address in line and "lost" in line]
    assert f"({gone.address}) with ranks {RANKS[lost]}" in line, line
    print(f"{how}: {took:.1f} seconds: {line}")


def test_the_other_host_tells_why_a_process_failed(
    hosts: list[Host], data_bin: Path, tmp_path: Path
) -> None:
    arguments = launch.training(
        *(data_bin, tmp_path / "saved", "avgk", *FLAGS, *ENDLESS, "--no-save"),
        *("--sffn-expert-parallel", "2"),
    )
    job = Job(tmp_path, hosts, launch.HERE / "faulty_worker.py", "out of memory", "3", *arguments)
    assert job.wait(hosts[0], ENDING_SECONDS) != 0
    (line,) = [line for line in job.said(hosts[0]).splitlines() if line.startswith("rank 3 on ")]
    reason = "has failed: RuntimeError: out of memory, as a GPU says it"
    assert line.endswith(f"({hosts[1].address}) {reason}"), line


@pytest.mark.parametrize("lost", [1, 0])
def test_training_goes_on_with_the_host_that_is_left(
    lost: int, hosts: list[Host], data_bin: Path, tmp_path: Path
) -> None:
    """``torchrun --nnodes 1:2`` starts two processes from the checkpoint of update 4, which four
    processes have written. Their losses are those of a training that is resumed by hand.

    The launchers meet at a store on a third machine, so that any host may vanish. It runs beside
    the host that is left."""
    save_dir = tmp_path / "saved"
    arguments = launch.training(
        *(data_bin, save_dir, "avgk", *FLAGS, "--max-update", "8", "--save-interval-updates", "4"),
        *("--sffn-expert-parallel", "2", "--peer-timeout", str(SECONDS)),
    )
    left = hosts[1 - lost]
    store = left.start(tmp_path / "store.log", "-c", STORE)
    flags = ("--nnodes", "1:2", "--max-restarts", "1", "--rdzv_endpoint", f"{left.address}:29500")
    rank = RANKS[lost][0]
    job = Job(
        *(tmp_path, hosts, HERE / "vanishing.py", "6", rank, *arguments),
        **{"flags": flags, "meets": False, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    assert job.wait(left) == 0, job.said(left)[-4000:]
    assert job.wait(hosts[lost]) == -signal.SIGKILL
    store.kill()
    went_on = losses(job.said(left).partition("training on 2 devices")[2])

    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    checkpoint = save_dir / "checkpoint_1_4.pt"
    shutil.copy(checkpoint, by_hand)
    parts = torch.load(checkpoint, weights_only=True)["sffn"]["folder"]
    shutil.copytree(save_dir / parts, by_hand / parts)
    arguments[arguments.index(str(save_dir))] = str(by_hand)
    resumed = launch.train(2, tmp_path / "jobs", {"job": arguments})["job"]
    assert went_on == commands.losses(resumed) and list(went_on) == [5, 6, 7, 8]
