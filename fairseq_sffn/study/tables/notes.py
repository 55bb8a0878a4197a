"""Sentences below a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..outcomes import Outcome, count_missing
from ..plan import Table
from .part import text

FLOPS_NOTE = (
    "Training FLOPs: three forward passes, and one more of the layers for the recomputation of "
    "activations, done or not; selection is counted alike where no gradient goes through it."
)


def seeds_note(outcomes: Sequence[Outcome]) -> str:
    """How many seeds there are, and what ± is."""
    counts = {len(o.row.seeds) for o in outcomes}
    if counts == {1}:
        return "One seed."
    only = max(counts)
    if len(counts) == 1:
        return f"Mean ± standard deviation of {only} seeds."
    return f"Mean ± standard deviation of up to {only} seeds; where there is no ±, one seed."


def gaps_notes(outcomes: Sequence[Outcome]) -> list[str]:
    """What is not there, and why."""
    gone, all_ = count_missing(outcomes)
    notes = [f"{gone} of {all_} trainings are missing."] if gone else []
    if gone and any(0 < len(o.results) < len(o.cells) for o in outcomes):
        notes.append("Where a row has only some of its seeds, it shows those.")
    for o in outcomes:
        if o.diverged:
            seeds = ", ".join(map(str, o.diverged))
            notes.append(f"{text(o.row.label)} diverged (seed {seeds}).")
    return notes


def versions_notes(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """How many versions of the code the results are of, if several."""
    count = len({result["versions"]["fairseq_sffn"] for result in results})
    return [f"Trained with {count} versions of the code."] if count > 1 else []


def machine_note(outcomes: Sequence[Outcome]) -> str:
    """What was trained on."""
    machines = dict.fromkeys(r["machine"] for o in outcomes for r in o.good.values())
    return f"Trained on {' or '.join(machines)}." if machines else ""


def note_of(table: Table) -> list[str]:
    """The table's own."""
    return [table.note] if table.note else []
