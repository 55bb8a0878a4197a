"""Two hosts train as one host does with the same four processes."""

import json
from pathlib import Path

import torch

from tests import commands
from tests.expert_parallel import launch
from tests.integration.hosts.jobs import FLAGS, Job, final_state
from tests.integration.hosts.network import Host

UPDATES = 5
KINDS = {
    "data parallel": 1,
    "expert parallel within a host": 2,
    "expert parallel across hosts": 4,
}
"""Kind of training -> processes over which the blocks are sharded."""


def test_losses_and_parameters_of_one_host(
    hosts: list[Host], data_bin: Path, tmp_path: Path
) -> None:
    """Processes send the same numbers in the same order, so all results are equal to the last
    bit."""
    jobs = {
        place: {
            kind: launch.training(
                *(data_bin, tmp_path / place / kind, "avgk", *FLAGS),
                *("--sffn-expert-parallel", str(shards), "--max-update", str(UPDATES)),
            )
            for kind, shards in KINDS.items()
        }
        for place in ("one", "two")
    }
    one = launch.train(4, tmp_path / "one", jobs["one"])
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "jobs.json").write_text(json.dumps(jobs["two"]))
    job = Job(tmp_path, hosts, launch.HERE / "worker.py", tmp_path / "two" / "jobs.json")
    for host in hosts:
        assert job.wait(host) == 0, job.said(host)[-4000:]
    assert all(host.sent_bytes() > 100_000 for host in hosts)
    for kind, shards in KINDS.items():
        losses = commands.losses((tmp_path / "two" / f"{kind}.0.log").read_text())
        assert losses == commands.losses(one[kind]) and len(losses) == UPDATES
        states = [final_state(tmp_path / place / kind) for place in jobs]
        assert len(states[0]["parts"]) == (shards if shards > 1 else 0)
        torch.testing.assert_close(*states, rtol=0, atol=0)
