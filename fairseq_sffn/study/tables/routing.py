"""How the blocks of each layer are used, and for which tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ...memory import usage
from ..outcomes import Outcome, Study, all_results
from ..plan import Table
from ..routing import MOST_KEPT, MOST_LISTED, MOST_PAIRS, POSITIONS
from ..statistics import correlation, same_token, shared_blocks, summarize
from .notes import gaps_notes, note_of, seeds_note, versions_notes
from .part import Part, Parts, Show, Value, code, markdown, summary, text, whole

LISTED_BLOCKS = 3


def routing(study: Study, table: Table) -> Parts:
    """How each layer's blocks are used, and for which tokens."""
    outcomes = study.outcomes(table)
    columns: dict[str, Show] = {
        "model": text,
        "layer": str,
        "most loaded / mean": summary(2),
        "used blocks": summary(1, "%"),
        "block entropy, bits": summary(2),
        "token dependence": summary(2),
        "agreement of seeds": summary(2),
        "agreement with tokens": summary(2),
    }
    rows = [
        dict(zip(columns, (o.row.label, layer, *layer_values(study, o, layer)), strict=True))
        for o in outcomes
        for layer in o.layers
    ]
    notes = [
        seeds_note(outcomes),
        "All on the validation split; layers count from 0. Block entropy: of the block of a random "
        "assignment. Token dependence: mutual information of token id and block over its maximum, "
        "block entropy less log2 of the active blocks; 1 where the token id determines the blocks "
        "(an id that occurs once seems to). Agreement compares which positions are put together, "
        f"as seeds number blocks differently: for each pair of {POSITIONS} random positions, the "
        "share of their blocks that they have in common. Agreement of seeds is the correlation of "
        "these shares between two seeds (mean ± standard deviation over pairs of seeds); agreement "
        "with tokens is their correlation with whether both positions have the same token.",
        *unknown_notes(outcomes),
        *gaps_notes(outcomes),
        *versions_notes(all_results(outcomes)),
        *note_of(table),
    ]
    return {"": [Part(columns, rows, notes)], "blocks": [example_blocks(outcomes)]}


def unknown_notes(outcomes: Sequence[Outcome]) -> list[str]:
    """Why something is not told."""
    layers = [layer for o in outcomes for r in o.good.values() for layer in r["routing"].values()]
    notes = []
    if not all(layer["blocks"] for layer in layers):
        notes.append(f"Agreements are not known where more than {MOST_KEPT} blocks are active.")
    if not all(layer["top_tokens"] for layer in layers):
        notes.append(f"Tokens are not listed where there are more than {MOST_LISTED} blocks.")
    if any(layer["token_bits"] is None for layer in layers):
        notes.append(
            "Token dependence is not known where there are more than "
            f"{MOST_PAIRS:,} pairs of block and token type."
        )
    return notes


def layer_values(study: Study, outcome: Outcome, layer: str) -> list[Value]:
    """The figures of a layer."""
    memory = study.model(outcome.row).memory
    assert memory is not None
    found = [result["routing"][layer] for result in outcome.good.values()]
    counts = [torch.tensor(f["counts"]) for f in found]
    shares = [token_share(f, memory.active_blocks) for f in found]
    alike = [shared_blocks(f["blocks"]) for f in found if f["blocks"]]
    positions = [f["positions"] for f in found if f["blocks"]]
    seeds = [
        correlation(alike[i], alike[j])
        for i, j in itertools.combinations(range(len(alike)), 2)
        if positions[i] == positions[j]
    ]
    tokens = [correlation(a, same_token(p)) for a, p in zip(alike, positions, strict=True)]
    return [
        summarize(map(usage.load_max, counts)),
        summarize(map(usage.memory_usage, counts)),
        summarize(f["block_bits"] for f in found),
        summarize(known(shares)),
        summarize(known(seeds)),
        summarize(known(tokens)),
    ]


def token_share(layer: Mapping[str, Any], active_blocks: int) -> float | None:
    """How much of a use's block the token id tells, of what it could at most: even where it decides
    a token's blocks, it leaves open which of them a use is. ``None``: nothing is to be told, or it
    was not counted."""
    most = layer["block_bits"] - math.log2(active_blocks)
    bits = layer["token_bits"]
    return bits / most if bits is not None and most > 1e-3 else None


def known(values: Iterable[float | None]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None]


def example_blocks(outcomes: Sequence[Outcome]) -> Part:
    """The tokens of some blocks of each layer, of the first seed."""
    columns: dict[str, Show] = {
        "model": text,
        "layer": str,
        "block": whole,
        "load / mean": "{:.1f}".format,
        "tokens": markdown,
    }
    rows = []
    for o in outcomes:
        for layer in o.layers:
            found = o.good[min(o.good)]["routing"][layer]
            for block, load_, tokens_ in most_loaded(found):
                shown = " ".join(map(code, tokens_))
                values: tuple[Value, ...] = (o.row.label, layer, block, load_, shown)
                rows.append(dict(zip(columns, values, strict=True)))
    note = (
        f"The {LISTED_BLOCKS} most loaded blocks of each layer, first seed, validation split, and "
        "the tokens most over-represented in each: those that use it most often beyond what "
        "independence of token and block would give."
    )
    return Part(columns, rows, [note])


def most_loaded(layer: Mapping[str, Any]) -> list[tuple[int, float, list[str]]]:
    """Number, load over mean and top tokens of the most loaded blocks; the lower number first where
    loads are alike. Empty where tokens were not listed."""
    counts, top = layer["counts"], layer["top_tokens"]
    mean = sum(counts) / len(counts)
    order = sorted(range(len(counts)), key=lambda block: (-counts[block], block))
    return [
        (block, counts[block] / mean, top[block])
        for block in order[:LISTED_BLOCKS]
        if top and counts[block]
    ]
