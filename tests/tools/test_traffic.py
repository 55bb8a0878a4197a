"""What two processes send and keep, against the bytes and the memory of a plan."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from fairseq_sffn.memory import MemoryConfig, ProcessGroups, SparseMemory
from fairseq_sffn.memory.selectors.avgk import AvgK
from fairseq_sffn.tools import traffic
from fairseq_sffn.tools.plan import plan_figures
from tests.commands import leave
from tests.tools.planned import TOKENS, TYPES, WIDTH, lm, loss_and_kept_bytes, setting

RANKS = 2
UNEVEN = (60, 75)
"""Number of tokens of each rank."""
MEMORIES = {
    "avgk": dict(block_size=4, active_blocks=4),
    "avgk_gated": dict(block_size=4, active_blocks=4, gate="softmax"),
    "avgk_by_keys_alone": dict(
        block_size=4, active_blocks=4, selector=AvgK.Config(exclude_bias=True)
    ),
    "avgk_averaged": dict(
        block_size=4, active_blocks=4, gate="softmax", selector=AvgK.Config(key_ema=0.9)
    ),
    "switch": dict(block_size=16, active_blocks=1),
    "rand_hash": dict(block_size=4, active_blocks=3, vocab_size=TYPES),
}
LMS = {
    "avgk": dict(),
    "avgk_checkpointed": dict(checkpoint_activations=True),
    "avgk_gated": dict(sffn_gate="sigmoid"),
    "avgk_shared": dict(sffn_shared_blocks=2, sffn_glu="silu"),
    "switch": dict(),
}


def method_of(name: str) -> str:
    """Return the method of a variant."""
    return name.partition("_")[0] if name in LMS else name.removesuffix("_gated")


def memory_config(name: str) -> MemoryConfig:
    options = {"selector": method_of(name), **MEMORIES[name]}
    return MemoryConfig(WIDTH, num_cells=256, **options)


class Wire:
    """Counts the bytes that this rank sends when it dispatches tokens, and in rings of mean
    keys."""

    def __init__(self) -> None:
        self.tokens = self.mean_keys = 0
        all_to_all, all_gather = dist.all_to_all_single, dist.all_gather_single
        reduce_scatter = dist.reduce_scatter_single

        def exchange(
            output: Any, input: Any, output_split_sizes=None, input_split_sizes=None, **rest: Any
        ) -> Any:
            sizes = input_split_sizes or [len(input) // RANKS] * RANKS
            others = sum(sizes) - sizes[dist.get_rank()]
            self.tokens += others * input.shape[1:].numel() * input.itemsize
            return all_to_all(output, input, output_split_sizes, input_split_sizes, **rest)

        def gather(whole: Any, part: Any, **rest: Any) -> Any:
            self.mean_keys += (RANKS - 1) * part.nbytes
            return all_gather(whole, part, **rest)

        def scatter(part: Any, whole: Any, **rest: Any) -> Any:
            self.mean_keys += (RANKS - 1) * part.nbytes
            return reduce_scatter(part, whole, **rest)

        dist.all_to_all_single, dist.all_gather_single = exchange, gather
        dist.reduce_scatter_single = scatter


def memory_on_a_rank(name: str, rank: int, wire: Wire) -> dict[str, Any]:
    torch.manual_seed(0)
    memory = SparseMemory(memory_config(name), ProcessGroups(blocks=dist.group.WORLD))
    torch.manual_seed(1 + rank)
    x = torch.randn(UNEVEN[rank], WIDTH, requires_grad=True)
    token_ids = torch.randint(TYPES, UNEVEN[rank : rank + 1])
    wire.tokens = wire.mean_keys = 0
    output = memory(x, token_ids, losses=False)
    output.output.sum().backward()
    return {
        "blocks": output.selection.blocks.tolist(),
        "sent": int(output.usage.sent),
        "wire": [wire.tokens, wire.mean_keys],
    }


def lm_on_a_rank(name: str, rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = lm(method_of(name), sffn_expert_parallel=RANKS, **LMS[name])
    torch.manual_seed(1 + rank)
    passes: list[Any] = []
    memory = next(module for module in model.modules() if isinstance(module, SparseMemory))

    def take(module: nn.Module, args: Any, output: Any) -> None:
        passes.append((output.selection.blocks.tolist(), int(output.usage.sent)))

    memory.register_forward_hook(take)
    loss, kept = loss_and_kept_bytes(model, RANKS)
    loss.backward()
    blocks, sent = passes[0]  # the other pass is recomputation
    sharded = [p.numel() for p in model.parameters() if hasattr(p, "expert")]
    whole = sum(p.numel() for p in model.parameters())
    params = {"replicated": whole - sum(sharded), "sharded": sum(sharded)}
    return {"blocks": blocks, "sent": sent, "kept": kept, "params": params}


def on_a_rank(rank: int, folder: str) -> None:
    """Run one of the processes."""
    torch.set_num_threads(1)
    init = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=RANKS)
    wire = Wire()
    results = {
        "memories": {name: memory_on_a_rank(name, rank, wire) for name in MEMORIES},
        "lms": {name: lm_on_a_rank(name, rank) for name in LMS},
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the results of each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_a_rank, (str(folder),), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def traffic_of(blocks: list[Any], rank: int, num_blocks: int) -> dict[str, int]:
    """Count rows and assignments to and from other ranks, one by one.

    Args:
        blocks: blocks of each rank's tokens.
    """
    counts = dict.fromkeys(
        ("rows_sent", "rows_received", "assignments_sent", "assignments_received"), 0
    )
    for source, tokens in enumerate(blocks):
        for token in tokens:
            owners = [block * RANKS // num_blocks for block in token]
            if source == rank:
                counts["assignments_sent"] += sum(owner != rank for owner in owners)
                counts["rows_sent"] += len({owner for owner in owners if owner != rank})
            elif rank in owners:
                counts["rows_received"] += 1
                counts["assignments_received"] += owners.count(rank)
    return counts


@pytest.mark.parametrize("name", MEMORIES)
def test_bytes_sent_are_what_a_memory_logs(name: str, ranks: list[Any]) -> None:
    config = memory_config(name)
    results = [result["memories"][name] for result in ranks]
    blocks = [result["blocks"] for result in results]
    for rank, result in enumerate(results):
        counts = traffic_of(blocks, rank, config.num_blocks)
        assert all(counts.values())
        assert traffic.sent_bytes(config, RANKS, 4, **counts) == result["sent"]
        assert [result["sent"], traffic.mean_keys_bytes(config, RANKS, 4)] == result["wire"]
    assert results[0]["sent"] != results[1]["sent"]


@pytest.mark.parametrize("name", LMS)
def test_bytes_sent_are_what_a_layer_of_a_model_logs(name: str, ranks: list[Any]) -> None:
    config = next(iter(lm(method_of(name), **LMS[name]).memory_configs.values())).routed
    results = [result["lms"][name] for result in ranks]
    blocks = [result["blocks"] for result in results]
    for rank, result in enumerate(results):
        counts = traffic_of(blocks, rank, config.num_blocks)
        recomputed = name.endswith("checkpointed")
        assert result["sent"] == traffic.sent_bytes(
            config, RANKS, 4, **counts, recomputed=recomputed
        )


def test_expectation_is_close_for_random_blocks(ranks: list[Any]) -> None:
    config = memory_config("rand_hash")
    mean = sum(result["memories"]["rand_hash"]["sent"] for result in ranks) / RANKS
    tokens = sum(UNEVEN) // RANKS
    assert traffic.expected_sent_bytes(config, RANKS, 4, tokens) == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize("name", LMS)
def test_parameters_and_activations_of_a_sharded_model(name: str, ranks: list[Any]) -> None:
    results = [result["lms"][name] for result in ranks]
    model = lm(method_of(name), **LMS[name])
    plan = plan_figures(model, setting(world_size=RANKS, sffn_expert_parallel=RANKS))
    (config,) = (memory.routed for memory in model.memory_configs.values())
    recomputed = name.endswith("checkpointed")
    sent = traffic.expected_sent_bytes(config, RANKS, 4, TOKENS, recomputed)
    assert plan["sent_per_sparse_layer"] == [round(sent)]
    assert plan["params"] == results[0]["params"] == results[1]["params"]
    if name.endswith("checkpointed"):  # one layer is computed again later
        assert plan["activations"]["layer_inputs"] == 2 * TOKENS * WIDTH * 4
    else:
        mean = sum(result["kept"] for result in results) / RANKS
        assert plan["memory"]["activations"] == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize("shards", [1, 2, 8, 32])
@pytest.mark.parametrize("active", [1, 4, 30])
def test_visits_are_those_of_random_draws(active: int, shards: int) -> None:
    config = MemoryConfig(WIDTH, num_cells=64, block_size=2, active_blocks=active)
    rng, tokens = random.Random(0), 4000
    visits = 0
    for _ in range(tokens):
        blocks = rng.sample(range(config.num_blocks), active)
        visits += len({block * shards // config.num_blocks for block in blocks})
    expected = shards * traffic.visit_probability(config, shards)
    assert expected == pytest.approx(visits / tokens, rel=0.02)
