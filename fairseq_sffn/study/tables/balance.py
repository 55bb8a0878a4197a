"""Perplexity beside how evenly blocks are used."""

from __future__ import annotations

import statistics

import torch

from ...memory import usage
from ..outcomes import Outcome, Study
from ..plan import Table
from ..statistics import summarize
from .part import Part, Parts, Value, summary
from .perplexity import perplexity


def balance(study: Study, table: Table) -> Parts:
    """Perplexity beside how evenly blocks are used on the validation split, at the end."""
    parts = perplexity(study, table)
    (part,) = parts[""]
    columns = dict(part.columns) | {
        "most loaded / mean": summary(2),
        "used blocks": summary(1, "%"),
        "entropy": summary(3),
    }
    rows = [
        {**row, **dict(zip(list(columns)[-3:], load(o), strict=True))}
        for row, o in zip(part.rows, study.outcomes(table), strict=True)
    ]
    note = (
        "Load on the validation split at the end of training, mean of the sparse layers: of the "
        "most loaded block over the mean; share of the blocks that some token uses; entropy over "
        "its maximum, 1 for an even load."
    )
    return parts | {"": [Part(columns, rows, [*part.notes, note])]}


def load(outcome: Outcome) -> tuple[Value, Value, Value]:
    """Most loaded block over mean, share of used blocks and entropy: means of layers, by seed."""
    measures = (usage.load_max, usage.memory_usage, usage.load_entropy)
    layers = [
        [torch.tensor(layer["counts"]) for layer in result["routing"].values()]
        for result in outcome.good.values()
    ]
    found = [
        summarize(statistics.fmean(map(measure, counts)) for counts in layers if counts)
        for measure in measures
    ]
    return found[0], found[1], found[2]
