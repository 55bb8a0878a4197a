"""Collective operations under the names of current PyTorch, and of PyTorch before 2.12."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils

import fairseq_sffn.expert_parallel.launch  # noqa: F401
from fairseq_sffn.memory.renamed import all_gather_single, reduce_scatter_single

NEW = {
    "all_gather_single": "all_gather_into_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("old", [True, False])
def test_either_name(old: bool, world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for new_name, old_name in NEW.items():
        function = getattr(dist, new_name, None) or getattr(dist, old_name)
        for name in (new_name, old_name):
            monkeypatch.delattr(dist, name, raising=False)
        monkeypatch.setattr(dist, old_name if old else new_name, function, raising=False)
    rows, whole, part = torch.arange(6.0).view(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)
    all_gather_single(whole, rows, group=dist.group.WORLD)
    reduce_scatter_single(part, rows, group=dist.group.WORLD)
    assert torch.equal(whole, rows) and torch.equal(part, rows)


def test_lists_of_cpus_beside_a_gpu(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--cpu`` works on a machine that has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = {"loss": torch.ones(2), "name": "a"}
    (gathered,) = distributed_utils.all_gather_list(data, dist.group.WORLD)
    assert gathered["name"] == "a" and torch.equal(gathered["loss"], torch.ones(2))
