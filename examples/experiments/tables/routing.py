"""Tables of how the blocks of each layer are used, and for which tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fairseq_sffn.memory import MemoryConfig, usage
from fairseq_sffn.tools.routing import MOST_KEPT, MOST_LISTED, MOST_PAIRS, POSITIONS

from ..files import Table
from ..outcomes import Experiments, Outcome
from ..summaries import Summary, correlation, same_token, shared_blocks, summarize
from .part import (
    Column,
    Part,
    Parts,
    make,
    markdown,
    runs_note,
    summary,
    text,
    whole,
)

LISTED_BLOCKS = 3

NOTE = (
    "Measured on the validation split; layers count from 0. Block entropy: entropy of the block of "
    "a random assignment. Token dependence: mutual information of token id and block over its "
    "maximum, which is the block entropy less log2 of the active blocks. It is 1 where the token "
    "id determines the blocks; an id that occurs once seems to. Agreement compares which positions "
    "share blocks, as each seed numbers its blocks differently: for each pair of "
    f"{POSITIONS} random positions, the share of their blocks that they have in common. Agreement "
    "of seeds: correlation of these shares between two seeds (mean ± standard deviation over pairs "
    "of seeds). Agreement with tokens: their correlation with whether both positions have the same "
    "token."
)


class Layer(NamedTuple):
    """A layer of a row: the row, the layer's name, and its routing in each run."""

    outcome: Outcome
    name: str
    found: list[dict[str, Any]]


def routing(experiments: Experiments, table: Table) -> Parts:
    """Make a table of the routing of each layer, and one of the tokens of some blocks."""
    outcomes = experiments.outcomes(table)
    layers = [
        Layer(o, name, [result["routing"][name] for result in o.good.values()])
        for o in outcomes
        for name in o.layers
    ]

    def load(measure: Callable[[torch.Tensor], float]) -> Callable[[Layer], Summary | None]:
        return lambda layer: summarize(measure(torch.tensor(f["counts"])) for f in layer.found)

    columns = [
        Column("model", text, lambda layer: layer.outcome.row.label),
        Column("layer", str, lambda layer: layer.name),
        Column("most loaded / mean", summary(2), load(usage.load_max)),
        Column("used blocks", summary(1, "%"), load(usage.memory_usage)),
        Column(
            "block entropy, bits",
            summary(2),
            lambda layer: summarize(f["block_bits"] for f in layer.found),
        ),
        Column(
            "token dependence",
            summary(2),
            lambda layer: dependence(layer.found, experiments.memories(layer.outcome)[layer.name]),
        ),
        Column("agreement of seeds", summary(2), seed_agreement),
        Column("agreement with tokens", summary(2), token_agreement),
    ]
    unknown = unknown_notes([f for layer in layers for f in layer.found])
    notes = (runs_note(outcomes), NOTE, *unknown, table.note)
    return {"": [make(columns, layers, *notes)], "blocks": [example_blocks(layers)]}


def unknown_notes(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say why something is not known."""
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


def token_share(layer: Mapping[str, Any], active_blocks: int) -> float | None:
    """Return the mutual information of token id and block over its maximum. The maximum is below
    the block entropy, as even an id that determines a token's blocks leaves open which of them a
    use is. ``None`` where the maximum is 0 or the information is not known."""
    most = layer["block_bits"] - math.log2(active_blocks)
    bits = layer["token_bits"]
    return bits / most if bits is not None and most > 1e-3 else None


def dependence(found: Iterable[Mapping[str, Any]], memory: MemoryConfig) -> Summary | None:
    """Summarise the :func:`token_share` of a layer over runs."""
    return known(token_share(layer, memory.routed.active_blocks) for layer in found)


def known(values: Iterable[float | None]) -> Summary | None:
    """Summarise the values that are known."""
    return summarize(value for value in values if value is not None)


def seed_agreement(layer: Layer) -> Summary | None:
    """Summarise the correlation of shared blocks between seeds."""
    kept = [(shared_blocks(f["blocks"]), f["positions"]) for f in layer.found if f["blocks"]]
    pairs = itertools.combinations(kept, 2)
    return known(correlation(a, b) for (a, first), (b, second) in pairs if first == second)


def token_agreement(layer: Layer) -> Summary | None:
    """Summarise the correlation of shared blocks with equal tokens."""
    return known(
        correlation(shared_blocks(f["blocks"]), same_token(f["positions"]))
        for f in layer.found
        if f["blocks"]
    )


def example_blocks(layers: Sequence[Layer]) -> Part:
    """Make a table of the tokens of the most loaded blocks of each layer, for the first seed."""
    items = [
        (layer, *block)
        for layer in layers
        for block in most_loaded(layer.outcome.first["routing"][layer.name])
    ]
    columns = [
        Column("model", text, lambda item: item[0].outcome.row.label),
        Column("layer", str, lambda item: item[0].name),
        Column("block", whole, lambda item: item[1]),
        Column("load / mean", "{:.1f}".format, lambda item: item[2]),
        Column("tokens", markdown, lambda item: " ".join(map(code, item[3]))),
    ]
    note = (
        f"The {LISTED_BLOCKS} most loaded blocks of each layer, first seed, validation split. "
        "Tokens: those that use the block most often beyond what independence of token and block "
        "would give."
    )
    return make(columns, items, note)


def most_loaded(layer: Mapping[str, Any]) -> list[tuple[int, float, list[str]]]:
    """Return number, load over mean, and top tokens of the most loaded blocks, of equally loaded
    ones the lower number first. Empty where tokens are not known."""
    counts, top = layer["counts"], layer["top_tokens"]
    mean = sum(counts) / len(counts)
    order = sorted(range(len(counts)), key=lambda block: (-counts[block], block))
    return [
        (block, counts[block] / mean, top[block])
        for block in order[:LISTED_BLOCKS]
        if top and counts[block]
    ]


def code(value: str) -> str:
    """Format a word as code, whatever characters it has."""
    fence, pad = ("``", " ") if "`" in value else ("`", "")
    return f"{fence}{pad}{value}{pad}{fence}".replace("|", "\\|")
