"""The plan against the memory and traffic of training: in two processes, and by the tensors that
autograd and optimizers keep."""

from __future__ import annotations

import gc
import json
import random
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.optim import FP16Optimizer, MemoryEfficientFP16Optimizer, build_optimizer
from omegaconf import OmegaConf, open_dict
from torch import nn

from fairseq_sffn.criterions.sffn_cross_entropy import (
    SFFNCrossEntropyConfig,
    SFFNCrossEntropyCriterion,
)
from fairseq_sffn.memory import MemoryConfig, ProcessGroups, SparseMemory
from fairseq_sffn.memory.selectors.avgk import AvgK
from fairseq_sffn.tools import cli, traffic
from fairseq_sffn.tools.activations import activation_bytes
from fairseq_sffn.tools.cost import cost_by_part, total, training_flops_per_token
from fairseq_sffn.tools.plan import Setting, plan_figures
from tests.commands import ROOT, leave
from tests.models.small_lm import METHODS, build, language_modeling, lm_config

WIDTH, TYPES, RANKS = 64, 104, 2
TOKENS, LENGTH = 256, 32
UNEVEN = (60, 75)
"""Number of tokens of each rank."""
MEMORIES = {
    "avgk": dict(block_size=4, active_blocks=4),
    "avgk_gated": dict(block_size=4, active_blocks=4, gate="softmax"),
    "avgk_by_keys_alone": dict(
        block_size=4, active_blocks=4, selector=AvgK.Config(exclude_bias=True)
    ),
    "switch": dict(block_size=16, active_blocks=1),
    "rand_hash": dict(block_size=4, active_blocks=3, vocab_size=TYPES),
}
LMS = {
    "avgk": dict(),
    "avgk_checkpointed": dict(checkpoint_activations=True),
    "avgk_gated": dict(sffn_gate="sigmoid"),
    "switch": dict(),
}


def method_of(name: str) -> str:
    """Return the method of a variant."""
    return name.removesuffix("_gated").removesuffix("_checkpointed")


def memory_config(name: str) -> MemoryConfig:
    options = {"selector": method_of(name), **MEMORIES[name]}
    return MemoryConfig(WIDTH, num_cells=256, **options)


def lm(name: str, **options: Any) -> Any:
    """Build two layers without dropout, of which the second is sparse, with the engine of a GPU."""
    sizes = dict(decoder_layers=2, decoder_embed_dim=WIDTH, decoder_ffn_embed_dim=256, dropout=0.0)
    if name in ("avgk", "rand_hash"):
        sizes["sffn_block_size"] = 16
    if name != "dense":
        cells = name in ("vanilla_m", "lorkm") or name.startswith("pkm")
        sizes["sffn_engine"] = "embedding_bag" if cells else "tiled"
    config = lm_config(f"transformer_lm_{name}_tiny", LENGTH, **{**sizes, **options})
    return build(config, TYPES).float()


def loss_of(model: nn.Module, world_size: int = 1) -> torch.Tensor:
    config = SFFNCrossEntropyConfig(
        sentence_avg=False,
        distributed_world_size=world_size,
        ddp_backend="legacy_ddp",
        log_format="simple",
        tensorboard_logdir="",
    )
    tokens = torch.randint(4, TYPES, (TOKENS // LENGTH, LENGTH + 1))
    lengths = torch.full((len(tokens),), LENGTH)
    sample = {
        "net_input": {"src_tokens": tokens[:, :-1].clone(), "src_lengths": lengths},
        "target": tokens[:, 1:].clone(),
        "ntokens": TOKENS,
    }
    return SFFNCrossEntropyCriterion(config, language_modeling(TYPES))(model, sample)[0]


class Kept:
    """Holds a tensor as long as autograd keeps it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def loss_and_kept_bytes(model: nn.Module, world_size: int = 1) -> tuple[torch.Tensor, int]:
    """Return the loss, and the bytes of distinct storages kept for its backward pass, without
    parameters and token ids."""
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        kept.add(packed := Kept(tensor))
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        loss = loss_of(model, world_size)
    gc.collect()
    storages = {k.tensor.untyped_storage().data_ptr(): k.tensor.untyped_storage() for k in kept}
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    token_ids = 2 * TOKENS * torch.int64.itemsize  # the embedding and the loss read them
    return loss, sum(storage.nbytes() for storage in storages.values()) - token_ids


def setting(**options: Any) -> Setting:
    plain = dict(
        world_size=1,
        sffn_expert_parallel=1,
        tokens_per_rank=TOKENS,
        tokens_per_sample=LENGTH,
        precision="fp32",
        bandwidth=25.0,
        flops=100.0,
    )
    return Setting(**{**plain, **options})


# Two processes


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
    model = lm(method_of(name), **LMS[name])
    results = [result["lms"][name] for result in ranks]
    blocks = [result["blocks"] for result in results]
    for rank, result in enumerate(results):
        counts = traffic_of(blocks, rank, model.memory_config.num_blocks)
        recomputed = name.endswith("checkpointed")
        assert result["sent"] == traffic.sent_bytes(
            model.memory_config, RANKS, 4, **counts, recomputed=recomputed
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


# One process


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("method", METHODS)
def test_activations_are_what_autograd_keeps(method: str, activation: str) -> None:
    model = lm(method, activation_fn=activation)
    measured = loss_and_kept_bytes(model)[1]
    parts = activation_bytes(model, TOKENS, LENGTH, 1, torch.float32)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("avgk", dict(sffn_gate="softmax")),
        ("avgk", dict(sffn_gate="sigmoid", sffn_freq=1)),
        ("vanilla_m", dict(sffn_gate="sigmoid")),
        ("vanilla_m", dict(sffn_gate="softmax", sffn_block_size=16)),
        ("vanilla_m", dict(sffn_gate="sigmoid", vanilla_m_aggregate="avg_abs")),
        ("pkm", dict(pkm_coefficients="activation")),
        ("switch", dict(decoder_output_dim=32, share_decoder_input_output_embed=False)),
        ("switch", dict(decoder_input_dim=32, share_decoder_input_output_embed=False)),
        ("dense", dict(layernorm_embedding=True, activation_fn="gelu_accurate")),
    ],
)
def test_activations_of_other_models(method: str, options: dict[str, Any]) -> None:
    model = lm(method, **options)
    measured = loss_and_kept_bytes(model)[1]
    parts = activation_bytes(model, TOKENS, LENGTH, 1, torch.float32)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("method", ["dense", "avgk", "switch"])
def test_activations_in_half_precision(method: str) -> None:
    model = lm(method, activation_fn="gelu").bfloat16()
    measured = loss_and_kept_bytes(model)[1]
    parts = activation_bytes(model, TOKENS, LENGTH, 1, torch.bfloat16)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.02)


def test_dropout_keeps_masks() -> None:
    """A mask has a byte per number, which dropout on a CPU does not have."""
    kept = [
        sum(activation_bytes(lm("avgk", **options), TOKENS, LENGTH, 1, torch.float32).values())
        for options in (dict(), dict(dropout=0.1), dict(dropout=0.1, activation_dropout=0.1))
    ]
    assert kept[1] - kept[0] == TOKENS * WIDTH * (1 + 2 * 2)
    assert kept[2] - kept[1] == TOKENS * 256 * (1 + 4) * 2


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("fp32", None),
        ("bf16", FP16Optimizer),
        ("fp16", FP16Optimizer),
        ("memory_efficient_bf16", MemoryEfficientFP16Optimizer),
        ("memory_efficient_fp16", MemoryEfficientFP16Optimizer),
    ],
)
@pytest.mark.parametrize("method", ["dense", "switch"])
def test_parameters_gradients_and_optimizer_state(
    method: str, precision: str, kind: type | None
) -> None:
    """The state is checked after an update. It is in bfloat16, as fairseq refuses fp16 without
    CUDA."""
    model = lm(method)
    cfg = OmegaConf.structured(FairseqConfig)
    with open_dict(cfg):
        cfg.optimizer = {"_name": "sffn_adam"}
        add_defaults(cfg)
    cfg.optimization.lr, cfg.common.bf16 = [0.01], kind is not None
    model = model if kind is None else model.bfloat16()
    params = list(model.parameters())
    optimizer = (
        build_optimizer(cfg.optimizer, params)
        if kind is None
        else kind.build_optimizer(cfg, params)
    )
    optimizer.backward(loss_of(model))
    optimizer.step()
    gradients = [p.grad for p in params]
    copies = getattr(optimizer, "fp32_params", [])
    state = [
        t for s in optimizer.optimizer.state.values() for t in s.values() if torch.is_tensor(t)
    ]
    state += [*copies, *(copy.grad for copy in copies)]
    plan = plan_figures(model, setting(precision=precision))["memory"]
    for name, tensors in (
        ("parameters", params),
        ("gradients", gradients),
        ("optimizer_state", state),
    ):
        assert plan[name] == sum(tensor.nbytes for tensor in tensors)
    assert plan["total"] == sum(plan.values()) - plan["total"]


def test_time_and_what_is_sent_of_gradients() -> None:
    model = lm("avgk")
    alone = plan_figures(model, setting())
    assert set(alone["sent"].values()) == {0} and alone["communication_share"] == 0
    sharded = plan_figures(model, setting(world_size=8, sffn_expert_parallel=2, bandwidth=1.0))
    params, sent = sharded["params"], sharded["sent"]
    assert alone["params"]["replicated"] == params["replicated"] + 2 * params["sharded"]
    assert sent["replicated_gradients"] == round(2 * 7 / 8 * 4 * params["replicated"])
    assert sent["sharded_gradients"] == 2 * 3 / 4 * 4 * params["sharded"]
    assert sent["sparse_layers"] == sharded["sent_per_sparse_layer"]
    assert sent["total"] == sum(sent.values()) - sent["total"]
    seconds = sharded["compute_seconds"], sharded["communication_seconds"]
    assert seconds[1] == sent["total"] / 1e9
    assert sharded["communication_share"] == pytest.approx(seconds[1] / sum(seconds))
    parts = cost_by_part(model, LENGTH)
    assert seconds[0] * 100e12 == pytest.approx(3 * TOKENS * total(parts).flops_per_token)
    checkpointed = plan_figures(lm("avgk", checkpoint_activations=True), setting())
    again = TOKENS * training_flops_per_token(parts)
    assert checkpointed["compute_seconds"] * 100e12 == pytest.approx(again)
    # Replicas of all blocks
    whole = plan_figures(model, setting(world_size=8))
    assert whole["sent"]["sparse_layers"] == whole["params"]["sharded"] == 0


# The command

MEDIUM = ("--arch", "transformer_lm_avgk_gpt3_medium", "--world-size", "64")
MEDIUM += ("--sffn-expert-parallel", "8", "--tokens-per-rank", "4096")


def plan(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Run ``fairseq-sffn plan`` and return its output."""
    cli.main(["plan", *flags])
    return capsys.readouterr().out


def test_table() -> None:
    command = [sys.executable, "-m", "fairseq_sffn", "plan", *MEDIUM]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    cells = [re.split(r"  +", line.strip()) for line in asked.stdout.splitlines()]
    lines = {label: values for label, *values in cells}
    assert cells[0] == ["transformer_lm_avgk_gpt3_medium: 51,200 types, fp32"]
    assert "parameters of a rank: 321,169,408 replicated, 67,141,632 sharded" in lines
    assert lines["memory of a rank"] == ["MB"] and lines["sent by a rank"] == ["MB", "ms"]
    assert lines["parameters"] == lines["gradients"] == ["1,553.2"]
    assert lines["optimizer state"] == ["3,106.5"]
    assert lines["replicated gradients"] == ["2,529.2", "101.2"]
    assert max(map(len, asked.stdout.splitlines())) <= 80


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    figures = json.loads(plan(capsys, *MEDIUM, "--json"))
    assert figures["params"] == {"replicated": 321_169_408, "sharded": 67_141_632}
    assert figures["params"]["replicated"] + 8 * figures["params"]["sharded"] == 858_302_464
    # A token uses 64 of 1024 blocks, so it visits nearly all ranks.
    row = 1024 * 4
    assert figures["sent_per_sparse_layer"] == pytest.approx(
        4 * 7 * 4096 * row + 8 * 56 * 4096, rel=1e-3
    )
    assert figures["world_size"] == 64 and figures["precision"] == "fp32"
    assert 0 < figures["communication_share"] < 1


@pytest.mark.parametrize("world_size", [8, 4096])
@pytest.mark.parametrize("name", ["switch", "gshard_8d", "hash_layer", "base", "pkm_ffn"])
def test_many_ranks(name: str, world_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--arch", f"transformer_lm_{name}_tiny", "--precision", "memory_efficient_fp16")
    flags += ("--world-size", str(world_size), "--tokens-per-rank", "8192")
    figures = [
        json.loads(plan(capsys, *flags, "--sffn-expert-parallel", shards, "--json"))
        for shards in ("2", "8")
    ]
    assert figures[1]["params"]["sharded"] * 4 == figures[0]["params"]["sharded"] > 0
    assert figures[1]["memory"]["optimizer_state"] < figures[0]["memory"]["optimizer_state"]
    assert figures[1]["sent"]["sparse_layers"] > figures[0]["sent"]["sparse_layers"] > 0


SMALL = ("--arch", "transformer_lm_switch_tiny", "--world-size", "8", "--tokens-per-rank", "512")
REFUSED = [
    ("--world-size 0", "must be at least 1"),
    ("--world-size -8", "must be at least 1"),
    ("--tokens-per-rank 0", "must be at least 1"),
    ("--tokens-per-sample 0", "must be at least 1"),
    ("--vocab-size 4", "must be at least 5"),
    ("--bandwidth -1.0", "must be positive and finite"),
    ("--bandwidth nan", "must be positive and finite"),
    ("--flops 0.0", "must be positive and finite"),
    ("--flops inf", "must be positive and finite"),
    ("--sffn-expert-parallel 0", "must be at least 1"),
    ("--sffn-expert-parallel 3", "does not divide --world-size 8"),
    ("--sffn-expert-parallel 8 --sffn-expansion 4", "does not divide the 4 blocks of a layer"),
    ("--sffn-expert-parallel 2 --arch transformer_lm_pkm_tiny", "pkm has keys of its own"),
    ("--sffn-expert-parallel 2 --arch transformer_lm_vanilla_m_tiny", "scores every key"),
    ("--sffn-expert-parallel 2 --arch transformer_lm_dense_tiny", "has no sparse layers"),
    ("--decoder-layers 0", "must be at least 1"),
    ("--arch nonsense", "is unknown"),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED)
def test_wrong_input_is_refused_in_one_line(
    flags: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan(capsys, *SMALL, *flags.split())
    line = stopped.value.code
    assert isinstance(line, str) and "\n" not in line
    assert line.startswith(" ".join(flags.split()[:2]) + ": ") and reason in line
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flags", [["--nonsense", "3"], ["--precision", "fp8"]])
def test_unknown_flags_are_usage_errors(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan(capsys, *SMALL, *flags)
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err
