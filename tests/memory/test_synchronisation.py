"""The host does not wait for what a layer computes on an accelerator, so it can run ahead.

The engines, which compute the selected blocks, have separate tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fairseq_sffn.memory import MemoryOutput, ProcessGroups, SparseMemory
from fairseq_sffn.memory.selectors import hash_layer, hash_moe, rand_hash
from fairseq_sffn.memory.selectors.avgk import AvgK
from fairseq_sffn.memory.selectors.base_layer import BASELayer
from tests.memory.cases import CASE_GATES, CASES, build, tokens
from tests.synchronisations import Synchronisations, operations

LEFT_OUT = ("memory/compute/", "memory/assignment.py")
"""Code that may wait: the engines, and the host's own copy of the scores."""
STATEFUL = dict(selector=AvgK.Config(center=True, key_ema=0.9), balance_rate=0.1)


@pytest.fixture(autouse=True)
def token_ids_are_checked_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hash_layer, hash_moe, rand_hash):
        monkeypatch.setattr(module, "check_token_ids", lambda token_ids, vocab_size: None)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def waits(
    memory: SparseMemory, padded: bool = False, losses: bool = True, backward: bool = True
) -> Counter[str]:
    """Count where a pass of some tokens waits."""
    x, token_ids = tokens(3, 7)
    x.requires_grad_()
    padding_mask = torch.rand(3, 7) < 0.3 if padded else None
    with Synchronisations(*LEFT_OUT) as places:
        out = memory(x, token_ids, padding_mask=padding_mask, losses=losses)
        if backward:
            objective(out).backward()
    return places


def objective(out: MemoryOutput) -> torch.Tensor:
    extra = [loss for loss in (out.balance_loss, out.z_loss) if loss is not None]
    return sum(extra, start=out.output.sum())


def assigns(memory: SparseMemory) -> bool:
    return isinstance(memory.selector, BASELayer) and memory.training


EVERY_WAY = tuple(product((True, False), (True, False), (0.0, 0.7)))
"""Whether in training, whether there is padding, and the capacity factor."""


@pytest.mark.parametrize(("case", "gate"), CASE_GATES)
def test_selectors_gates_losses_and_capacity(case, gate):
    # A gate does not know in which way it is used.
    ways = EVERY_WAY if gate == "none" else [(True, True, 0.7), (False, False, 0.0)]
    for training, padded, capacity in ways:
        factors = dict(capacity_factor=capacity, eval_capacity_factor=capacity)
        memory = build(case, gate=gate, engine="embedding_bag", **factors).train(training)
        places = waits(memory, padded)
        told = (training, padded, capacity, places)
        assert operations(places) == ["cpu"] * assigns(memory), told


@pytest.mark.parametrize("case", CASES)
def test_without_losses_and_gradients(case):
    memory = build(case, engine="embedding_bag").eval()
    with torch.no_grad():
        assert not waits(memory, losses=False, backward=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_autocast(case, dtype):
    memory = build(case, torch.float32, engine="embedding_bag")
    x, token_ids = tokens(3, 7, dtype=torch.float32)
    with (
        Synchronisations(*LEFT_OUT) as places,
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        objective(memory(x, token_ids)).backward()
    assert operations(places) == ["cpu"] * assigns(memory), places


@pytest.mark.parametrize("padded", [False, True])
def test_running_state(padded):
    assert not waits(build("avgk-g4", **STATEFUL, engine="embedding_bag"), padded)


# Several processes


SHARDABLE = [case for case in CASES if case.startswith(("avgk", "switch", "gshard", "base"))]
SHARDABLE += ["rand_hash", "hash_layer", "pkm_ffn", "moe", "sigma_moe", "hash_moe"]


@pytest.mark.parametrize("capacity", [0.0, 0.7])
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("case", SHARDABLE)
def test_expert_parallel_waits_once(case, gate, capacity, world):
    groups = ProcessGroups(blocks=world)
    memory = build(case, groups=groups, gate=gate, capacity_factor=capacity, engine="embedding_bag")
    places = waits(memory, padded=True)
    assert operations(places) == ["cpu"] * assigns(memory) + ["tolist"], places


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_tokens_that_are_one_micro_batch(case, padded, world):
    memory = build(case, groups=ProcessGroups(tokens=world), engine="embedding_bag")
    places = waits(memory, padded)
    assert operations(places) == ["cpu"] * assigns(memory), places


def test_running_state_of_all_processes(world):
    memory = build(
        "avgk-g4", **STATEFUL, groups=ProcessGroups(tokens=world), engine="embedding_bag"
    )
    assert not waits(memory, padded=True)


@pytest.mark.parametrize("padded", [False, True])
def test_base_of_all_processes_waits_twice(padded, world):
    selector = BASELayer.Config(scope="world")
    memory = build(
        "base", selector=selector, groups=ProcessGroups(tokens=world), engine="embedding_bag"
    )
    places = waits(memory, padded)
    assert operations(places) == ["cpu", "tolist"], places
