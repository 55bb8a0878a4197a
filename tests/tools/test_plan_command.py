"""``fairseq-sffn plan``: the memory of an update, its time, and the command."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.optim import FP16Optimizer, MemoryEfficientFP16Optimizer, build_optimizer
from omegaconf import OmegaConf, open_dict

from fairseq_sffn.errors import UsageError
from fairseq_sffn.tools import cli
from fairseq_sffn.tools.cost import cost_by_part, total, training_flops_per_token
from fairseq_sffn.tools.plan import plan_figures
from tests.commands import ROOT
from tests.tools.planned import LENGTH, TOKENS, lm, loss_of, setting

# Memory and time of an update


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
    assert sent["sparse_layers"] == sum(sharded["sent_per_sparse_layer"])
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


@pytest.mark.parametrize(
    ("ranks_per_node", "shards", "shares"),
    [
        # sparse layers, mean keys, replicated gradients, sharded gradients
        (8, 2, (0, 0, 0, 0)),
        (4, 2, (0, 0, 1 / 4, 1 / 2)),
        (4, 4, (0, 0, 1 / 4, 1)),
        (2, 8, (6 / 7, 1 / 2, 1 / 2, 0)),
        (2, 4, (2 / 3, 1 / 2, 1 / 2, 1)),
        (1, 2, (1, 1, 1, 1)),
    ],
)
def test_bytes_between_nodes(ranks_per_node: int, shards: int, shares: tuple[float, ...]) -> None:
    """Eight ranks. The shares are counted by hand, as edges of rings and pairs of ranks."""
    asked = setting(
        **dict(world_size=8, sffn_expert_parallel=shards, ranks_per_node=ranks_per_node),
        **dict(bandwidth=2.0, node_bandwidth=50.0),
    )
    figures = plan_figures(lm("avgk", sffn_gate="softmax"), asked)
    sent, between = figures["sent"], figures["sent_between_nodes"]
    for (name, size), share in zip(list(sent.items())[:4], shares, strict=True):
        assert between[name] == pytest.approx(share * size, abs=1), name
        slower = max(share * size / 2e9, (1 - share) * size / 50e9)
        assert figures["sent_seconds"][name] == pytest.approx(slower, rel=1e-6), name
    assert between["total"] == sum(list(between.values())[:4])
    assert figures["communication_seconds"] == pytest.approx(sum(figures["sent_seconds"].values()))


def test_layers_that_differ_add_up() -> None:
    """A model of a plan sends and keeps what models of each of its layers do together."""
    options = dict(world_size=4, sffn_expert_parallel=2)
    layers = ("hash_layer:0", "avgk/block_size=16/gate=softmax:1")
    mixed = plan_figures(lm("sffn", sffn_layers=",".join(layers)), setting(**options))
    alone = [plan_figures(lm("sffn", sffn_layers=layer), setting(**options)) for layer in layers]
    sent = [figures["sent_per_sparse_layer"][0] for figures in alone]
    assert mixed["sent_per_sparse_layer"] == sent and sent[0] < sent[1]
    assert mixed["sent"]["sparse_layers"] == pytest.approx(sum(sent), abs=1)
    assert mixed["sent"]["mean_keys"] == alone[1]["sent"]["mean_keys"] > 0
    for part in ("selection", "memory"):
        kept = [figures["activations"][part] for figures in alone]
        assert mixed["activations"][part] == sum(kept)
    sharded = [figures["params"]["sharded"] for figures in alone]
    assert mixed["params"]["sharded"] == sum(sharded)


def test_every_layer_of_a_plan_must_be_sharded(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--arch", "transformer_lm_sffn_tiny", "--world-size", "2", "--tokens-per-rank", "64")
    with pytest.raises(UsageError, match="--sffn-expert-parallel 2: vanilla_m scores every key"):
        plan(
            *(capsys, *flags, "--sffn-expert-parallel", "2"),
            *("--sffn-layers", "hash_layer:0,vanilla_m:1"),
        )


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
    assert lines["memory of a rank"] == ["MB"] and lines["sent by a rank"] == [
        "MB",
        "between nodes",
        "ms",
    ]
    assert lines["parameters"] == lines["gradients"] == ["1,553.2"]
    assert lines["optimizer state"] == ["3,106.5"]
    assert lines["replicated gradients"] == ["2,529.2", "2,529.2", "101.2"]
    assert max(map(len, asked.stdout.splitlines())) <= 80


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    figures = json.loads(plan(capsys, *MEDIUM, "--json"))
    assert figures["params"] == {"replicated": 321_169_408, "sharded": 67_141_632}
    assert figures["params"]["replicated"] + 8 * figures["params"]["sharded"] == 858_302_464
    # A token uses 64 of 1024 blocks, so it visits nearly all ranks.
    row = 1024 * 4
    sent = 4 * 7 * 4096 * row + 8 * 56 * 4096
    assert figures["sent_per_sparse_layer"] == pytest.approx([sent] * 4, rel=1e-3)
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
    ("--ranks-per-node 0", "must be at least 1"),
    ("--ranks-per-node 3", "does not divide --world-size 8"),
    ("--ranks-per-node 4 --sffn-expert-parallel 6 --world-size 12", "neither divides"),
    ("--node-bandwidth 0.0", "must be positive and finite"),
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
