"""Measures forward + backward of a sparse layer with selection, against an equally large dense FFN.

With ``--glu``, both have gated cells or hidden units, two thirds as many.
Token ids are uniform and hidden states are normal, so blocks get about equally many tokens. In rows
marked skewed, half of the tokens also use one common block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timing import (
    CPU,
    Place,
    Work,
    arguments,
    compare,
    dense_ffn,
    forward_backward,
    hidden_states,
    place_of,
    run_part,
)
from torch import Tensor, nn

from fairseq_sffn.memory import MemoryConfig, Selector, SparseMemory
from fairseq_sffn.memory.activations import ACTIVATIONS, GATED
from fairseq_sffn.models.gated import GatedLinear, default_gated_width

EXPANSION = 16
VOCABULARY = 8000
BLOCK_SIZES = (1024, 256, 64, 16, 1)
ANY_BLOCK_SIZE = ("avgk", "rand_hash", "vanilla_m")
PKM_CELLS = 128  # four heads of 32, as in its paper


class Row(NamedTuple):
    selector: str
    block_size: int
    skewed: bool = False


def block_sizes(ffn: int) -> list[int]:
    """Return the FFN's width and the sizes that divide it, largest first."""
    return sorted({ffn, *(g for g in BLOCK_SIZES if g < ffn and not ffn % g)}, reverse=True)


def default_rows(ffn: int) -> list[Row]:
    """Return every selector at its default block size."""
    registry = Selector.registry
    return [Row(name, min(ffn, registry[name].default_block_size(ffn))) for name in registry]


def choose_rows(ffn: int, which: str) -> list[Row]:
    """Choose the rows to measure.

    Args:
        ffn: width of the dense FFN.
        which: ``all``: every selector with every block size it allows, and skewed routing;
            ``defaults``: every selector at its default, and Avg-K by block size; ``main``: the fast
            rows. Only ``all`` has Avg-K with blocks of one cell, which is slow.
    """
    sizes = block_sizes(ffn)
    rows = [Row("avgk", g) for g in sizes if g > 1]
    if which == "main":
        return [*rows, Row("switch", ffn), Row("hash_layer", ffn)]
    rows += default_rows(ffn)
    if which == "all":
        rows += [Row(name, g) for name in ANY_BLOCK_SIZE for g in sizes]
        rows += [Row("rand_hash", g, skewed=True) for g in sizes if g > 1]
    return sorted(set(rows), key=lambda row: (row.skewed, row.selector, -row.block_size))


def gated_ffn(width: int, units: int, glu: str, place: Place = CPU) -> nn.Module:
    """Build the gated FFN that sparse layers with gated cells are compared with."""
    first = GatedLinear(nn.Linear(width, units), nn.Linear(width, units), ACTIVATIONS[glu])
    return nn.Sequential(first, nn.Linear(units, width)).to(**place.tensors)


def memory_config(
    row: Row, width: int, ffn: int, expansion: int = EXPANSION, glu: str | None = None
) -> MemoryConfig:
    """Configure a memory with as many active cells as the FFN has units. PKM has ``PKM_CELLS``."""
    active = min(PKM_CELLS, ffn) if row.selector == "pkm" else ffn
    return MemoryConfig(
        embed_dim=width,
        num_cells=expansion * ffn,
        block_size=row.block_size,
        active_blocks=active // row.block_size,
        selector=row.selector,
        vocab_size=VOCABULARY,
        token_counts=[1] * VOCABULARY,
        glu=glu,
    )


def build_memory(row: Row, config: MemoryConfig, place: Place = CPU) -> SparseMemory:
    """Build a memory in training mode."""
    memory = SparseMemory(config)
    if row.skewed:
        # Half of the token ids get block 0 in place of one of their blocks, unless they have it.
        table_VA: Any = memory.selector.table
        without_V = (table_VA != 0).all(dim=1)
        without_V[VOCABULARY // 2 :] = False
        table_VA[without_V, 0] = 0
    return memory.to(**place.tensors)


def training_work(memory: SparseMemory, x: Tensor, token_ids: Tensor) -> Work:
    """Prepare forward + backward as in training, with the balance loss where the method has one."""
    weight = memory.config.selector_class.default_balance_weight

    def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
        out = memory(x, token_ids, losses=weight > 0)
        return out.output, weight * out.balance_loss if weight else None

    return forward_backward(memory, x, forward)


def measure(
    tokens: int,
    width: int,
    rows: list[Row],
    repeats: int,
    ffn: int | None = None,
    place: Place = CPU,
    glu: str | None = None,
) -> list[dict[str, Any]]:
    """Return a JSON row for each of ``rows``."""
    ffn = ffn or 4 * width
    x = hidden_states(tokens, width, place)
    token_ids = torch.randint(VOCABULARY, (tokens,), device=place.device)
    ffn_layer = gated_ffn(width, ffn, glu, place) if glu else dense_ffn(width, ffn, place)
    dense = forward_backward(ffn_layer, x)
    configs = [memory_config(row, width, ffn, glu=glu) for row in rows]
    works = {
        str(i): training_work(build_memory(row, config, place), x, token_ids)
        for i, (row, config) in enumerate(zip(rows, configs, strict=True))
    }
    timed = compare(dense, works, repeats, f"layer {tokens} x {width}", device=place.device)
    sizes = {**place.describe(), "tokens": tokens, "width": width, "ffn": ffn}
    return [
        {**sizes, **row._asdict(), "active_cells": config.active_cells, **figures}
        for row, config, figures in zip(rows, configs, timed.values(), strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, places=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", choices=["all", "defaults", "main"], default="all")
    parser.add_argument("--glu", choices=GATED, help="gated cells, against a gated FFN")
    args = parser.parse_args(argv)
    place, ffn = place_of(args), 4 * args.width
    if args.glu:
        ffn = default_gated_width(ffn)
    rows = choose_rows(ffn, args.rows)
    if args.glu:
        rows = [row for row in rows if Selector.registry[row.selector].key_table == "full"]
    run_part(
        "layer",
        args,
        lambda: measure(args.tokens, args.width, rows, args.repeats, ffn, place, args.glu),
    )


if __name__ == "__main__":
    main()
