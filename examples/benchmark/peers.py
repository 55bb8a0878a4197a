"""Measures mixtures of experts of other libraries, each against a dense FFN of its active size.

Runs in its own environment, which benchmark.sh makes from peers-requirements.txt, without this
project. A peer that is not installed or does not run gets a row that says so.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import (
    CPU,
    Place,
    arguments,
    compare,
    dense_ffn,
    forward_backward,
    hidden_states,
    place_of,
    progress,
    run_part,
)
from torch import Tensor, nn

EXPERTS = 16
REQUIREMENTS = Path(__file__).with_name("peers-requirements.txt")
Forward = Callable[[Tensor], Any]


class Peer(NamedTuple):
    """A layer of another library.

    Attributes:
        package: its name in peers-requirements.txt.
        layer: the module measured.
        build: function from width and number of cells to the module, a function that calls it on
            (N, width), and its number of active cells.
        active: description of how many cells are active.
    """

    package: str
    layer: str
    build: Callable[[int, int], tuple[nn.Module, Forward, int]]
    active: str


def gated_width(cells: int, experts: int) -> int:
    """Return the units of a gated expert, of which ``experts`` are active.

    A gated unit has three matrices, so 1.5 plain units cost as much as one gated unit. The result
    is a multiple of 8, as grouped_mm requires.
    """
    return max(8, round(cells / 1.5 / experts / 8) * 8)


def fairscale(width: int, cells: int) -> tuple[nn.Module, Forward, int]:
    import torch.distributed as dist
    from fairscale.nn.moe import MOELayer, Top2Gate

    if not dist.is_initialized():
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, store=dist.HashStore(), rank=0, world_size=1)
    experts = nn.ModuleList(dense_ffn(width, cells // 2) for _ in range(EXPERTS))
    layer = MOELayer(Top2Gate(width, EXPERTS), experts)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        output = layer(x.view(EXPERTS, -1, width))
        return output, 0.01 * layer.l_aux

    return layer, forward, cells


def mixtral(choices: int) -> Callable[[int, int], tuple[nn.Module, Forward, int]]:
    def build(width: int, cells: int) -> tuple[nn.Module, Forward, int]:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        units = gated_width(cells, choices)
        config = MixtralConfig(
            hidden_size=width,
            intermediate_size=units,
            num_local_experts=EXPERTS,
            num_experts_per_tok=choices,
            hidden_act="relu",
            experts_implementation="grouped_mm",
        )
        layer = MixtralSparseMoeBlock(config)
        draw(layer)
        return layer, lambda x: layer(x.unsqueeze(0)), units * choices * 3 // 2

    return build


def switch(width: int, cells: int) -> tuple[nn.Module, Forward, int]:
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
    )

    config = SwitchTransformersConfig(
        d_model=width,
        d_ff=cells,
        num_experts=EXPERTS,
        expert_capacity=2**30,  # dropless
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )
    layer = SwitchTransformersSparseMLP(config)
    draw(layer)
    return layer, lambda x: layer(x.unsqueeze(0)), cells


def st_moe(width: int, cells: int) -> tuple[nn.Module, Forward, int]:
    from st_moe_pytorch import MoE

    units = gated_width(cells, 2)
    # The library uses int(width * mult * 2 / 3) units.
    layer = MoE(width, EXPERTS, expert_hidden_mult=(units + 0.5) * 1.5 / width, gating_top_n=2)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        result = layer(x.unsqueeze(0))
        return result.outputs, result.total_aux_loss

    return layer, forward, units * 3


def mixture_of_experts(width: int, cells: int) -> tuple[nn.Module, Forward, int]:
    from mixture_of_experts import MoE

    layer = MoE(width, EXPERTS, hidden_dim=cells // 2)
    return layer, lambda x: layer(x.unsqueeze(0)), cells


def product_key_memory(width: int, cells: int) -> tuple[nn.Module, Forward, int]:
    from product_key_memory import PKM

    layer = PKM(width, heads=4, num_keys=round((EXPERTS * cells) ** 0.5), topk=32)
    return layer, lambda x: layer(x.unsqueeze(0)), 128


PEERS = (
    Peer("fairscale", "MOELayer + Top2Gate", fairscale, "2 experts of half the width; drops"),
    Peer("transformers", "Mixtral block, grouped_mm, top 1", mixtral(1), "gated, no biases"),
    Peer("transformers", "Mixtral block, grouped_mm, top 2", mixtral(2), "gated, no biases"),
    Peer("transformers", "SwitchTransformersSparseMLP", switch, "1 expert, no biases; dropless"),
    Peer("st-moe-pytorch", "MoE", st_moe, "gated, 2 experts or 1; drops"),
    Peer("mixture-of-experts", "MoE", mixture_of_experts, "2 experts or 1, no biases; drops"),
    Peer("product-key-memory", "PKM", product_key_memory, "4 heads of 32 values; dense has 4d"),
)


def draw(module: nn.Module) -> None:
    """Initialise the weights of a block that its library leaves empty outside a model."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)


def wanted_versions(requirements: str) -> dict[str, str]:
    """Return package -> version."""
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    return dict(line.split("==") for line in lines if line)


def measure_peer(
    peer: Peer, tokens: int, width: int, repeats: int, place: Place = CPU
) -> dict[str, Any]:
    """Measure a peer; the row has an ``error`` where that fails."""
    cells = 4 * width
    try:
        layer, forward, active = peer.build(width, cells)
        layer.to(**place.tensors)
        x = hidden_states(tokens, width, place)
        work = forward_backward(layer, x, forward)
        work.run()
    except Exception as error:  # any error that a user of the peer would meet
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    dense_cells = cells if peer.build is product_key_memory else active
    dense = forward_backward(dense_ffn(width, dense_cells, place), x)
    label = f"{peer.package} {peer.layer}"
    timed = compare(dense, {"peer": work}, repeats, label, device=place.device)["peer"]
    return {"active_cells": active, "dense_cells": dense_cells, **timed}


def measure(
    tokens: int,
    width: int,
    repeats: int,
    peers: tuple[Peer, ...] = PEERS,
    place: Place = CPU,
) -> list[dict[str, Any]]:
    """Return a JSON row for each peer."""
    wanted = wanted_versions(REQUIREMENTS.read_text())
    rows: list[dict[str, Any]] = []
    for peer in peers:
        row = {**place.describe(), "package": peer.package, "layer": peer.layer}
        row["active"] = peer.active
        try:
            row["version"] = importlib.metadata.version(peer.package)
        except importlib.metadata.PackageNotFoundError:
            row |= {"version": wanted[peer.package], "error": "not installable"}
            progress(f"{peer.package}: not installed", last=True)
        else:
            row |= measure_peer(peer, tokens, width, repeats, place)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    warnings.simplefilter("ignore")
    parser = arguments(__doc__, places=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args(argv)
    place = place_of(args)
    run_part(
        "peers",
        args,
        lambda: measure(args.tokens, args.width, args.repeats, place=place),
        of_project=False,
    )


if __name__ == "__main__":
    main()
