"""Conditions on an option that depend on other options, as data like :mod:`.ranges`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple


class Relation(NamedTuple):
    """A condition on an option that depends on other options.

    Attributes:
        group, option: the option that the error names.
        others: (group, option) of each option on which the condition depends.
        holds: takes the value of the option, which is not ``None``, and the values of the others.
            Returns whether the condition is met.
        reason: end of the error message. ``{0}`` stands for the first of the others.
        choice: the choice of the group, such as a scheduler, that has the condition; empty: all.
    """

    group: str
    option: str
    others: tuple[tuple[str, str], ...]
    holds: Callable[..., bool]
    reason: str
    choice: str = ""


def divides(value: int, other: int | None) -> bool:
    """Return whether a number divides another one, or the other one is ``None``."""
    return other is None or other % value == 0


def has_positions(width: int, learned: bool, none: bool) -> bool:
    """Return whether fairseq can compute the positions of a model.

    For sinusoidal positions, fairseq divides by half of the width minus 1.
    """
    return width not in (2, 3) or learned or none


def one_rate(rates: list[float]) -> bool:
    """Return whether there is one learning rate for all epochs."""
    return len(rates) == 1


def rises(numbers: list[float]) -> bool:
    """Return whether each number is larger than the one before it."""
    return all(low < high for low, high in itertools.pairwise(numbers))


def of_model(*options: str) -> tuple[tuple[str, str], ...]:
    """Return (group, option) of options of the model."""
    return tuple(("model", option) for option in options)


RELATIONS = (
    *(
        relation
        for side in ("encoder", "decoder")
        for relation in (
            Relation(
                *("model", f"{side}_attention_heads", of_model(f"{side}_embed_dim"), divides),
                f"must divide --{side}-embed-dim {{0}}",
            ),
            Relation(
                *("model", f"{side}_embed_dim"),
                of_model(f"{side}_learned_pos", "no_token_positional_embeddings"),
                has_positions,
                f"is too narrow for sinusoidal positions; take 4 or more, or --{side}-learned-pos",
            ),
        )
    ),
    *(
        Relation("model", f"adaptive_{of}_cutoff", (), rises, "must rise")
        for of in ("softmax", "input")
    ),
    Relation(
        *("distributed_training", "distributed_rank"),
        (("distributed_training", "distributed_world_size"),),
        lambda rank, ranks: rank < ranks,
        "must be below --distributed-world-size {0}",
    ),
    Relation(
        *("dataset", "shard_id", (("dataset", "num_shards"),)),
        lambda shard, shards: shard < shards,
        "must be below --num-shards {0}",
    ),
    Relation(
        *("generation", "diverse_beam_groups", (("generation", "beam"),)),
        lambda groups, beam: groups < 0 or divides(groups, beam),
        "must divide --beam {0}",
    ),
    *(
        Relation(
            *("generation", option, (("generation", "sampling"),)),
            lambda number, sampling: number < 0 or sampling,
            "needs --sampling",
        )
        for option in ("sampling_topk", "sampling_topp")
    ),
    Relation(
        *("generation", "min_len"),
        (("generation", "max_len_b"), ("generation", "max_len_a")),
        lambda least, most, growth: growth > 0 or least <= most,
        "must be at most --max-len-b {0}",
    ),
    *(
        Relation(
            *("lr_scheduler", "lr", (), one_rate),
            f"{choice} takes one learning rate; --lr-scheduler fixed takes one for each epoch",
            choice,
        )
        for choice in ("cosine", "inverse_sqrt", "reduce_lr_on_plateau", "tri_stage", "triangular")
    ),
    Relation(
        *("lr_scheduler", "max_lr", (("optimization", "lr"),)),
        lambda highest, rates: highest > rates[0],
        "must be above --lr {0}",
        "triangular",
    ),
    Relation(
        *("lr_scheduler", "min_lr", (("optimization", "lr"),)),
        lambda lowest, rates: lowest < rates[0],
        "must be below --lr {0}",
        "step",
    ),
    Relation(
        *("lr_scheduler", "lr_period_updates"),
        (("optimization", "max_update"), ("lr_scheduler", "warmup_updates")),
        lambda period, updates, warmup: period > 0 or updates > warmup,
        "needs a --max-update above the --warmup-updates",
        "cosine",
    ),
    Relation(
        *("lr_scheduler", "total_num_update", (), bool),
        "must be at least 1; it is --max-update unless set",
        "polynomial_decay",
    ),
    Relation(
        *("lr_scheduler", "phase_ratio", (("optimization", "max_update"),)),
        lambda phases, updates: sum(phases) == 1 and int(updates * phases[2]) > 0,
        "must add up to 1, with some of --max-update {0} in the last phase",
        "tri_stage",
    ),
    Relation(
        *("lr_scheduler", "decay_steps", (("lr_scheduler", "phase_ratio"),)),
        lambda steps, phases: steps > 0 or bool(phases),
        "must be at least 1, or set --phase-ratio",
        "tri_stage",
    ),
)
"""All conditions. They are checked after the ranges of the group."""
