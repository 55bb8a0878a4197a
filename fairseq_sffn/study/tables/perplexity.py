"""Perplexities of rows, in and out of domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..outcomes import Outcome, Study, all_results
from ..plan import Table, sweep_cells
from ..statistics import summarize
from .notes import FLOPS_NOTE, gaps_notes, machine_note, note_of, seeds_note, versions_notes
from .part import Part, Parts, Show, Value, millions, plain, summary, text

UNITS = {1e12: "10¹² FLOPs", 1e15: "10¹⁵ FLOPs", 1e18: "10¹⁸ FLOPs", 1e21: "10²¹ FLOPs"}


def flops_unit(largest: float) -> tuple[float, str]:
    """The unit in which the largest of some FLOPs is a number above 1, and what they are called."""
    fitting = [unit for unit in UNITS if unit <= largest] or [min(UNITS)]
    return fitting[-1], f"training compute, {UNITS[fitting[-1]]}"


def perplexity(study: Study, table: Table) -> Parts:
    """Perplexities of rows, in and out of domain."""
    outcomes = study.outcomes(table)
    columns, rows = perplexity_columns(study, outcomes)
    notes = [
        *(seeds_note(outcomes), *gaps_notes(outcomes), *versions_notes(all_results(outcomes))),
        *(FLOPS_NOTE, machine_note(outcomes), *note_of(table)),
    ]
    part = Part(columns, rows, list(filter(None, notes)))
    return {
        "": [part],
        "domains": [domains(outcomes)],
        "learning_rates": [learning_rates(study, table)],
    }


def perplexity_columns(
    study: Study, outcomes: Sequence[Outcome]
) -> tuple[dict[str, Show], list[dict[str, Value]]]:
    """The columns that tables of perplexity have in common, and their values."""
    flops = [study.training_flops(o) for o in outcomes]
    unit, name = flops_unit(max(flops))
    columns: dict[str, Show] = {
        "model": text,
        "parameters": millions,
        name: "{:#,.4g}".format,
        "learning rate": plain,
        "valid ppl": summary(1),
        "test ppl": summary(1),
        "out-of-domain ppl": summary(1),
    }
    rows = []
    for o, used in zip(outcomes, flops, strict=True):
        values: tuple[Value, ...] = (
            *(o.row.label, study.model(o.row).cost["params"], used / unit, o.lr),
            summarize(o.perplexity("valid").values()),
            summarize(o.perplexity("test").values()),
            summarize(o.out_of_domain().values()),
        )
        rows.append(dict(zip(columns, values, strict=True)))
    return columns, rows


@dataclass(frozen=True)
class Swept:
    """What a learning rate came to.

    Attributes:
        perplexity: on validation; ``None``: it diverged.
        chosen: whether it is the best of its sweep.
    """

    perplexity: float | None
    chosen: bool


def rate_cell(swept: Swept) -> str:
    """In bold if it was chosen."""
    shown = "diverged" if swept.perplexity is None else f"{swept.perplexity:,.1f}"
    return f"**{shown}**" if swept.chosen else shown


def learning_rates(study: Study, table: Table) -> Part:
    """Perplexity on validation of the short trainings that choose a method's learning rate."""
    rates = study.scale.learning_rates
    columns: dict[str, Show] = {"model": text, **{plain(rate): rate_cell for rate in rates}}
    rows, ends = [], []
    for label, found in study.sweeps(table).items():
        best = min(found, key=found.__getitem__) if len(found) == len(rates) else None
        tried = {
            plain(rate): Swept(ppl if ppl < math.inf else None, rate == best and ppl < math.inf)
            for rate, ppl in found.items()
        }
        rows.append({"model": label, **tried})
        if best in (min(rates), max(rates)) and found[best] < math.inf:
            ends.append(text(label))
    updates = max(1, round(study.scale.sweep_share * study.scale.updates))
    note = f"Validation perplexity after {updates} updates, one seed; bold: the chosen rate."
    if ends:
        note += f" At an end of the rates that were tried: {', '.join(ends)}."
    swept = [
        study.results.get(cell) for row in table.rows for cell in sweep_cells(row, study.scale)
    ]
    return Part(columns, rows, [note, *versions_notes(filter(None, swept))])


def domains(outcomes: Sequence[Outcome]) -> Part:
    """Perplexity on each set out of domain: a row for each set, a column for each model."""
    names = list(dict.fromkeys(name for o in outcomes for name in o.domains))
    columns: dict[str, Show] = {"set": text, **{o.row.label: summary(0) for o in outcomes}}
    rows = [
        {"set": name} | {o.row.label: summarize(o.perplexity(name).values()) for o in outcomes}
        for name in names
    ]
    notes = [seeds_note(outcomes), *gaps_notes(outcomes), *versions_notes(all_results(outcomes))]
    return Part(columns, rows, notes)
