"""Tables of what each method selects and costs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from fairseq_sffn.memory import MemoryConfig

from ..files import Row, Scale, Table
from ..outcomes import Experiments, Model
from .part import FLOPS_NOTE, Column, Part, Parts, make, text, whole

PAPER = {"size": "gpt3_medium", "dictionary": 51200, "tokens_per_sample": 2048}
"""The models of Liu et al. 2023: fairseq's 355M configuration."""


def taxonomy(experiments: Experiments, table: Table) -> Parts:
    """Make a table of costs at the given scale, and another at the paper's scale."""
    scales = [experiments.scale]
    if experiments.scale.size != PAPER["size"]:
        paper: dict[str, Any] = {**PAPER, "ffn_embed_dim": 4096, "flags": ""}
        scales.append(replace(experiments.scale, **paper))
    return {"": [costs(experiments, table, scale) for scale in scales]}


def costs(experiments: Experiments, table: Table, scale: Scale) -> Part:
    """Make a table of sizes and costs at a scale."""

    def of_model(value: Callable[[Model], Any]) -> Callable[[Row], Any]:
        return lambda row: value(experiments.model(row, scale))

    columns = [
        Column("model", text, lambda row: row.label),
        Column("g", numbers, of_model(lambda m: distinct(m, lambda c: c.block_size))),
        Column("b", numbers, of_model(lambda m: distinct(m, lambda c: c.active_blocks))),
        Column("parameters", whole, of_model(lambda m: m.cost["params"])),
        Column("active", whole, of_model(lambda m: m.cost["active_params"])),
        Column(
            "forward MFLOPs per token",
            "{:,.3f}".format,
            of_model(lambda m: m.cost["flops_per_token"] / 1e6),
        ),
        Column("selection", "{:+.2%}".format, of_model(lambda m: m.cost["selection_share"])),
        Column("overhead", "{:+.2%}".format, of_model(lambda m: m.cost["overhead_vs_dense"])),
        Column("selection by", text, of_model(selects)),
    ]
    note = (
        "g: cells per block; b: active blocks per token; active: parameters that a token uses. "
        "Selection: training FLOPs of selection over the dense model's. Overhead: training FLOPs "
        "beyond the dense model's, over the dense model's."
    )
    title = f"`_{scale.size}`, {scale.dictionary:,} types, context {scale.tokens_per_sample:,}"
    return make(columns, table.rows, note, FLOPS_NOTE, table.note, title=title)


def numbers(values: Iterable[int]) -> str:
    """Return several numbers as text."""
    return "; ".join(map(whole, values))


def distinct(model: Model, value: Callable[[MemoryConfig], Any]) -> list[Any]:
    """Return the different values of the sparse layers, in the order of the layers."""
    return list(dict.fromkeys(map(value, model.memories.values())))


def selects(model: Model) -> str:
    """Return what chooses a token's blocks, from the docstrings of the selectors' modules."""
    selectors = distinct(model, lambda config: config.selector_class)
    docs = [sys.modules[selector.__module__].__doc__ or "" for selector in selectors]
    return "; ".join(doc.splitlines()[0].partition(": ")[2].removesuffix(".") for doc in docs)
