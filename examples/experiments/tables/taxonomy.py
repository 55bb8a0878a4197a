"""Tables of what each method selects and costs."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fairseq_sffn.memory import MemoryConfig

from ..files import Scale, Table
from ..frame import Experiments, Model, build_model
from ..plan import row_flags
from .part import FLOPS_NOTE, Part, Parts, text

PAPER = {"size": "gpt3_medium", "dictionary": 51200, "tokens_per_sample": 2048}
"""The models of Liu et al. 2023: fairseq's 355M configuration."""


def taxonomy(experiments: Experiments, table: Table) -> Parts:
    """Make a table of costs at the given scale, and another at the paper's scale."""
    scales = [experiments.scale]
    if experiments.scale.size != PAPER["size"]:
        paper: dict[str, Any] = {**PAPER, "ffn_embed_dim": 4096, "flags": ""}
        scales.append(replace(experiments.scale, **paper))
    return {"": [costs(table, scale) for scale in scales]}


def costs(table: Table, scale: Scale) -> Part:
    """Make a table of sizes and costs at a scale."""
    models = [build_model(row.model, row_flags(row, scale), scale) for row in table.rows]
    cost = [model.cost for model in models]
    cells = {
        "model": [text(row.label) for row in table.rows],
        "g": ["; ".join(distinct(m, lambda config: f"{config.block_size:,}")) for m in models],
        "b": ["; ".join(distinct(m, lambda config: f"{config.active_blocks:,}")) for m in models],
        "parameters": [f"{one['params']:,}" for one in cost],
        "active": [f"{one['active_params']:,}" for one in cost],
        "forward MFLOPs per token": [f"{one['flops_per_token'] / 1e6:,.3f}" for one in cost],
        "selection": [f"{one['selection_share']:+.2%}" for one in cost],
        "overhead": [f"{one['overhead_vs_dense']:+.2%}" for one in cost],
        "selection by": map(selects, models),
    }
    note = (
        "g: cells per block; b: active blocks per token; active: parameters that a token uses. "
        "Selection: training FLOPs of selection over the dense model's. Overhead: training FLOPs "
        "beyond the dense model's, over the dense model's."
    )
    title = f"`_{scale.size}`, {scale.dictionary:,} types, context {scale.tokens_per_sample:,}"
    return Part(cells, [note, FLOPS_NOTE, table.note], title, left=["model", "selection by"])


def distinct(model: Model, value: Callable[[MemoryConfig], Any]) -> list[Any]:
    """Return the different values of the sparse layers, in the order of the layers."""
    return list(dict.fromkeys(map(value, model.memories.values())))


def selects(model: Model) -> str:
    """Return what chooses a token's blocks, from the docstrings of the selectors' modules."""
    selectors = distinct(model, lambda config: config.selector_class)
    docs = [sys.modules[selector.__module__].__doc__ or "" for selector in selectors]
    said = (doc.splitlines()[0].partition(": ")[2].removesuffix(".") for doc in docs)
    return text("; ".join(said))
