"""Two hosts train as one host does with the same four processes, and send what a plan expects."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fairseq_sffn.tools.language_model import build_language_model
from fairseq_sffn.tools.plan import Setting, plan_figures
from tests import commands
from tests.expert_parallel import launch
from tests.integration.hosts.jobs import FLAGS, Job, final_state
from tests.integration.hosts.network import HERE, two_hosts

UPDATES = 5
KINDS = {
    "data parallel": 1,
    "expert parallel within a host": 2,
    "expert parallel across hosts": 4,
}
"""Kind of training -> processes over which the blocks are sharded."""
COUNTED = (
    *("--decoder-embed-dim", "64", "--decoder-ffn-embed-dim", "256", "--sffn-block-size", "64"),
    *("--batch-size", "8"),
)
"""Flags of trainings whose bytes are counted. The gradients are large against all headers."""


class Trained(NamedTuple):
    """Trainings on two hosts.

    Attributes:
        folder: with a folder for the checkpoints of each training.
        logs: name -> log of rank 0.
        one: name -> log of rank 0 with four processes of one host, and its folder.
    """

    folder: Path
    logs: dict[str, str]
    one: dict[str, str]
    one_folder: Path


@pytest.fixture(scope="module")
def trained(
    can_have_hosts: None,
    quick_start: None,
    data_bin: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Trained]:
    folder, one_folder = (tmp_path_factory.mktemp(name) for name in ("two", "one"))

    def jobs(place: Path) -> dict[str, list[str]]:
        return {
            kind: launch.training(
                *(data_bin, place / kind, "avgk", *FLAGS, "--max-update", str(UPDATES)),
                *("--sffn-expert-parallel", str(shards)),
            )
            for kind, shards in KINDS.items()
        }

    counted = {
        f"counted {kind}": launch.training(
            *(data_bin, folder / f"counted {kind}", "rand_hash", *FLAGS, *COUNTED),
            *("--max-update", str(UPDATES), "--no-save", "--sffn-expert-parallel", str(shards)),
            *("--ddp-backend", "legacy_ddp" if shards == 2 else "pytorch_ddp"),
        )
        for kind, shards in KINDS.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs(folder) | counted))
    with two_hosts() as hosts:
        job = Job(folder, hosts, HERE / "counting_worker.py", folder / "jobs.json")
        for host in hosts:
            assert job.wait(host) == 0, job.said(host)[-4000:]
    one = launch.train(4, one_folder, jobs(one_folder))
    logs = {name: (folder / f"{name}.0.log").read_text() for name in [*KINDS, *counted]}
    yield Trained(folder, logs, one, one_folder)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_parameters_of_one_host(kind: str, trained: Trained) -> None:
    """Processes send the same numbers in the same order, so all results are equal to the last
    bit."""
    losses = commands.losses(trained.logs[kind])
    assert losses == commands.losses(trained.one[kind]) and len(losses) == UPDATES
    states = [final_state(folder / kind) for folder in (trained.folder, trained.one_folder)]
    assert len(states[0]["parts"]) == (KINDS[kind] if KINDS[kind] > 1 else 0)
    torch.testing.assert_close(*states, rtol=0, atol=0)


def counts(folder: Path, rank: int) -> dict[int, int]:
    """Return update -> bytes that a rank's host has sent until then."""
    lines = (folder / f"counts.{rank}").read_text().splitlines()
    return dict(map(json.loads, lines))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_on_the_cable_are_those_of_the_plan(kind: str, trained: Trained) -> None:
    """Headers add up to 2%. The plan leaves out barriers and logs, less than 40 kB in an update."""
    shards = KINDS[kind]
    flags = [*commands.SMALL, *COUNTED[:6]]
    model = build_language_model("transformer_lm_rand_hash_tiny", 64, 16, flags)
    setting = Setting(4, shards, 8 * 16, 16, "fp32", 25.0, 100.0, ranks_per_node=2)
    figures = plan_figures(model, setting)
    records = commands.records(trained.logs[f"counted {kind}"])[1:]
    between: dict[str, Any] = figures["sent_between_nodes"]
    expected = 2 * between["total"]
    if shards > 1:
        # Blocks are drawn by token id, and some tokens are frequent: routing is not quite even.
        sent = sum(float(record["sent_bytes"]) for record in records) / len(records)
        assert sent == pytest.approx(4 * figures["sent"]["sparse_layers"], rel=0.1)
        expected += (
            2 * between["sparse_layers"] * (sent / (4 * figures["sent"]["sparse_layers"]) - 1)
        )
    measured = []
    for rank in (0, 2):
        of = counts(trained.folder / f"counted {kind}", rank)
        measured.append((of[UPDATES] - of[1]) / (UPDATES - 1))
    mean = sum(measured) / 2
    print(f"{kind}: {mean:,.0f} bytes of a host in an update, {expected:,.0f} in the plan")
    assert expected < mean < 1.02 * expected + 40_000
