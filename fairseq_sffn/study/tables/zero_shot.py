"""Accuracy on zero-shot tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..outcomes import Outcome, Study, all_results
from ..plan import Table
from .notes import gaps_notes, note_of, versions_notes
from .part import Part, Parts, Show, Value, text

APART = "†"
"""Marks accuracies that differ from random."""


def zero_shot(study: Study, table: Table) -> Parts:
    """Accuracy on tasks, of the first seed of each row."""
    outcomes = study.outcomes(table)
    found = {o.row.label: tasks(o) for o in outcomes}
    known = {name: task for of_row in found.values() for name, task in of_row.items()}
    columns: dict[str, Show] = {
        "model": text,
        **{name: accuracy for name in known},
        "mean": lambda mean: f"{100 * mean:.1f}",
    }
    rows = [accuracies(o.row.label, found[o.row.label]) for o in outcomes]
    chance = {name: replace(task, accuracy=task.random, error=None) for name, task in known.items()}
    rows.append(accuracies("random", chance))
    notes = [
        "Accuracy in % ± standard error: of the answer with the highest log-likelihood per "
        "character; where there is none to choose from, of the last word, decoded greedily.",
        documents_note(known.values()),
        cut_note(known),
        "The first seed of each row." if any(len(o.row.seeds) > 1 for o in outcomes) else "",
        apart_note(found),
        *gaps_notes(outcomes),
        *versions_notes(all_results(outcomes)),
        *note_of(table),
    ]
    return {"": [Part(columns, rows, list(filter(None, notes)))]}


@dataclass(frozen=True)
class Task:
    """What was found on a zero-shot task.

    Attributes:
        documents: of the task.
        accuracy: with likelihoods normalised by length, where there are choices.
        error: its standard error; ``None``: not known.
        random: accuracy of guesses.
        cut: requests that were cut to the model's context.
        in_pieces: those of them whose continuation was scored in pieces.
    """

    documents: int
    accuracy: float
    error: float | None
    random: float
    cut: int = 0
    in_pieces: int = 0

    @property
    def apart(self) -> bool:
        """Whether it differs from random by more than two standard errors of guesses. Its own would
        be 0 where all or no documents are right."""
        error = math.sqrt(self.random * (1 - self.random) / self.documents)
        return abs(self.accuracy - self.random) > 2 * error


def tasks(outcome: Outcome) -> dict[str, Task]:
    """Name -> what was found, of the first seed that is there."""
    if not outcome.good:
        return {}
    found = outcome.good[min(outcome.good)]["zero_shot"]["tasks"]
    return {task["task"]: read_task(task) for task in found}


def read_task(task: Mapping[str, Any]) -> Task:
    """A task as ``fairseq-sffn zero-shot --json`` has it."""
    kind = "" if task["accuracy_norm"] is None else "_norm"
    accuracy, error = task[f"accuracy{kind}"], task[f"standard_error{kind}"]
    counts = (task.get(name, 0) for name in ("cut_requests", "requests_in_pieces"))
    return Task(task["documents"], accuracy, error, task["random"], *counts)


def accuracy(task: Task) -> str:
    """Accuracy in %, with a mark where it differs from random."""
    error = "" if task.error is None else f" ± {task.error:.1%}"
    return f"{task.accuracy:.1%}{error}".replace("%", "") + APART * task.apart


def accuracies(label: str, found: Mapping[str, Task]) -> dict[str, Value]:
    """A row: accuracies, and their mean."""
    row: dict[str, Value] = {"model": label, **found}
    if found:
        row["mean"] = statistics.fmean(task.accuracy for task in found.values())
    return row


def documents_note(found: Iterable[Task]) -> str:
    """How many documents there are."""
    counts = [task.documents for task in found]
    if not counts:
        return ""
    least, most = f"{min(counts):,}", f"{max(counts):,}"
    return f"{most if least == most else f'{least} to {most}'} documents a task."


def cut_note(found: Mapping[str, Task]) -> str:
    """Which tasks have requests that are longer than the model's context."""

    def listed(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{count:,} of {name}" for name, count in counts.items() if count)

    cut = listed({name: task.cut for name, task in found.items()})
    pieces = listed({name: task.in_pieces for name, task in found.items()})
    note = f"Requests longer than the model's context are cut at the left: {cut}." * bool(cut)
    return note + f" Continuations that are longer are scored in pieces: {pieces}." * bool(pieces)


def apart_note(found: Mapping[str, Mapping[str, Task]]) -> str:
    """How many accuracies differ from random."""
    apart = [task.apart for of_row in found.values() for task in of_row.values()]
    if not apart:
        return ""
    far = "two standard errors of guesses, sqrt(random (1 - random) / documents), from random"
    if not any(apart):
        return f"None of the {len(apart)} accuracies is more than {far}."
    return (
        f"{APART} more than {far}: {sum(apart)} of {len(apart)}. All rows answer the same "
        "documents: what most of them share, the dense model included, comes from the task, such "
        "as the lengths of its answers."
    )
