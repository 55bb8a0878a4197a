"""What each method selects and costs."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from ..outcomes import Model, Study
from ..plan import Scale, Table
from .notes import FLOPS_NOTE, note_of
from .part import Part, Parts, Show, Value, percent, text, whole

PAPER = {"size": "gpt3_medium", "dictionary": 51200, "tokens_per_sample": 2048}
"""The models of Liu et al. 2023: fairseq's 355M configuration."""


def taxonomy(study: Study, table: Table) -> Parts:
    """What each method selects and costs, at the study's scale and at the paper's."""
    parts = [costs(study, table, study.scale)]
    if study.scale.size != PAPER["size"]:
        paper: dict[str, Any] = {**PAPER, "ffn_embed_dim": 4096, "flags": ""}
        parts.append(costs(study, table, replace(study.scale, **paper)))
    return {"": parts}


def costs(study: Study, table: Table, scale: Scale) -> Part:
    """Sizes and costs of a table's models at a scale."""
    columns: dict[str, Show] = {
        "model": text,
        "g": whole,
        "b": whole,
        "parameters": whole,
        "active": whole,
        "forward MFLOPs per token": "{:,.3f}".format,
        "selection": percent,
        "overhead": percent,
        "selection by": text,
    }
    rows = []
    for row in table.rows:
        model = study.model(row, scale)
        memory, cost = model.memory, model.cost
        values: tuple[Value, ...] = (
            row.label,
            None if memory is None else memory.block_size,
            None if memory is None else memory.active_blocks,
            *(cost["params"], cost["active_params"], cost["flops_per_token"] / 1e6),
            *(cost["selection_share"], cost["overhead_vs_dense"], selects(model)),
        )
        rows.append(dict(zip(columns, values, strict=True)))
    notes = [
        "g: cells per block; b: active blocks per token; active: parameters that a token touches. "
        "Selection and overhead: training FLOPs of selection, and all beyond the dense model's, "
        "over the dense model's.",
        FLOPS_NOTE,
        *note_of(table),
    ]
    title = f"`_{scale.size}`, {scale.dictionary:,} types, context {scale.tokens_per_sample:,}"
    return Part(columns, rows, notes, title)


def selects(model: Model) -> str:
    """What chooses a token's blocks, as the selector's module says."""
    if model.memory is None:
        return ""
    doc = sys.modules[model.memory.selector_class.__module__].__doc__ or ""
    return doc.splitlines()[0].partition(": ")[2].removesuffix(".")
