"""Tables of how the blocks of each layer are used, and for which tokens."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from fairseq_sffn.memory import usage
from fairseq_sffn.tools.routing import MOST_KEPT, MOST_LISTED, MOST_PAIRS, POSITIONS

from ..files import Table
from ..frame import Experiments
from .part import Part, Parts, mean_sd, means, runs_note, text

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
LAYER = ["label", "layer"]
"""Columns that name a layer of a row."""
MEASURED = ["counts", "block_bits", "token_bits", "top_tokens", "blocks", "positions"]
"""Columns that are in results; see :mod:`fairseq_sffn.tools.routing`."""
COMPUTED = ["load_max", "used", "entropy", "dependence"]
"""Columns that are computed from them; see :func:`token_share` for the last one."""


def layers_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a data frame with a row for each sparse layer of each run: what results say of it, and
    ``load_max``, ``used`` and ``entropy`` of its load."""
    found = []
    for run in runs[runs.done & ~runs.diverged].itertuples():
        for name, routing in run.result["routing"].items():
            counts = torch.tensor(routing["counts"])
            active = run.model.memories[name].routed.active_blocks
            found.append(
                {
                    **{"label": run.label, "layer": name, "seed": run.seed, **routing},
                    **{"load_max": usage.load_max(counts), "used": usage.memory_usage(counts)},
                    "entropy": usage.load_entropy(counts),
                    "dependence": token_share(routing["block_bits"], routing["token_bits"], active),
                }
            )
    return pd.DataFrame(found, columns=[*LAYER, "seed", *MEASURED, *COMPUTED])


def routing(experiments: Experiments, table: Table) -> Parts:
    """Make a table of the routing of each layer, and one of the tokens of some blocks."""
    runs = experiments.runs(table)
    layers = layers_of(runs)
    rows = layers.drop_duplicates(LAYER)
    each = [layer for _, layer in layers.groupby(LAYER, sort=False)]
    cells = {
        "model": rows.label.map(text),
        "layer": rows.layer,
        "most loaded / mean": means(layers, "load_max", by=LAYER),
        "used blocks": means(layers, "used", 1, "%", by=LAYER),
        "block entropy, bits": means(layers, "block_bits", by=LAYER),
        "token dependence": means(layers, "dependence", by=LAYER),
        "agreement of seeds": map(seed_agreement, each),
        "agreement with tokens": map(token_agreement, each),
    }
    notes = [runs_note(runs), NOTE, *unknown_notes(layers), table.note]
    return {"": [Part(cells, notes)], "blocks": [example_blocks(rows)]}


def unknown_notes(layers: pd.DataFrame) -> list[str]:
    """Say why something is not known."""
    notes = []
    if not all(layers.blocks):
        notes.append(f"Agreements are not known where more than {MOST_KEPT} blocks are active.")
    if not all(layers.top_tokens):
        notes.append(f"Tokens are not listed where there are more than {MOST_LISTED} blocks.")
    if layers.token_bits.isna().any():
        notes.append(
            "Token dependence is not known where there are more than "
            f"{MOST_PAIRS:,} pairs of block and token type."
        )
    return notes


def token_share(block_bits: float, token_bits: float | None, active_blocks: int) -> float | None:
    """Return the mutual information of token id and block over its maximum. The maximum is below
    the block entropy, as even an id that determines a token's blocks leaves open which of them a
    use is. ``None`` where the maximum is 0 or the information is not known."""
    most = block_bits - math.log2(active_blocks)
    return token_bits / most if token_bits is not None and most > 1e-3 else None


def seed_agreement(layer: pd.DataFrame) -> str:
    """Format the correlation of shared blocks between seeds."""
    pairs = itertools.combinations(layer[layer.blocks.astype(bool)].itertuples(), 2)
    return mean_sd(
        correlation(shared_blocks(first.blocks), shared_blocks(second.blocks))
        for first, second in pairs
        if first.positions == second.positions
    )


def token_agreement(layer: pd.DataFrame) -> str:
    """Format the correlation of shared blocks with equal tokens."""
    return mean_sd(
        correlation(shared_blocks(one.blocks), shared_blocks([[token] for token in one.positions]))
        for one in layer[layer.blocks.astype(bool)].itertuples()
    )


def shared_blocks(blocks_PA: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    """Return the (P, P) share of their blocks that two positions have in common, from the (P, A)
    distinct blocks of each position."""
    blocks = np.array(blocks_PA)
    uses = np.zeros((len(blocks), blocks.max() + 1))
    np.put_along_axis(uses, blocks, 1.0, axis=1)
    return uses @ uses.T / blocks.shape[1]


def correlation(first_PP: Any, second_PP: Any) -> float:
    """Return Pearson's correlation of two symmetric matrices without their diagonals; NaN where
    one of them is constant."""
    pairs = np.triu_indices(len(first_PP), k=1)
    return pd.Series(first_PP[pairs]).corr(pd.Series(second_PP[pairs]))


def example_blocks(layers: pd.DataFrame) -> Part:
    """Make a table of the tokens of the most loaded blocks of each layer, for the first seed: of
    equally loaded ones, those with the lower number. Empty where tokens are not known."""
    lines = []
    for layer in layers[layers.top_tokens.astype(bool)].itertuples():
        loads = pd.Series(layer.counts) / np.mean(layer.counts)
        for block, load in loads[loads > 0].nlargest(LISTED_BLOCKS).items():
            tokens = " ".join(map(code, layer.top_tokens[block]))
            lines.append((text(layer.label), layer.layer, f"{block:,}", f"{load:.1f}", tokens))
    cells = pd.DataFrame(lines, columns=["model", "layer", "block", "load / mean", "tokens"])
    note = (
        f"The {LISTED_BLOCKS} most loaded blocks of each layer, first seed, validation split. "
        "Tokens: those that use the block most often beyond what independence of token and block "
        "would give."
    )
    return Part(cells, [note], left=["model", "tokens"])


def code(value: str) -> str:
    """Format a word as code, whatever characters it has."""
    fence, pad = ("``", " ") if "`" in value else ("`", "")
    return f"{fence}{pad}{value}{pad}{fence}".replace("|", "\\|")
