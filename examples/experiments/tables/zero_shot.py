"""Tables of accuracy on zero-shot tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..files import Table
from ..outcomes import Experiments, Outcome
from .part import Column, Parts, entry, make, runs_note, text

APART = "†"
"""Marks accuracies that differ from random."""


@dataclass(frozen=True)
class Task:
    """The result of a zero-shot task.

    Attributes:
        documents: number of documents.
        accuracy: accuracy, by length-normalised likelihood where there are choices.
        error: its standard error; ``None``: not known.
        random: accuracy of random guessing.
        cut: requests that were cut to the model's context.
        in_pieces: requests among them whose continuation was scored in pieces.
    """

    documents: int
    accuracy: float
    error: float | None
    random: float
    cut: int = 0
    in_pieces: int = 0

    @property
    def apart(self) -> bool:
        """Whether the accuracy differs from random by more than two standard errors of random
        guessing. Its own standard error is 0 where all or no documents are right."""
        error = math.sqrt(self.random * (1 - self.random) / self.documents)
        return abs(self.accuracy - self.random) > 2 * error

    def markdown(self) -> str:
        """Return the accuracy in %, with a mark where it differs from random."""
        error = "" if self.error is None else f" ± {self.error:.1%}"
        return f"{self.accuracy:.1%}{error}".replace("%", "") + APART * self.apart


def zero_shot(experiments: Experiments, table: Table) -> Parts:
    """Make a table of accuracy, for the first seed of each row."""
    outcomes = experiments.outcomes(table)
    found = {o.row.label: tasks(o) for o in outcomes}
    known = {name: task for of_row in found.values() for name, task in of_row.items()}
    chance = {name: replace(task, accuracy=task.random, error=None) for name, task in known.items()}
    columns = [
        Column("model", text, lambda item: item[0]),
        *(Column(name, Task.markdown, partial(entry, name)) for name in known),
        Column("mean", lambda mean: f"{100 * mean:.1f}", lambda item: mean_accuracy(item[1])),
    ]
    notes = (
        "Accuracy in % ± standard error. Multiple-choice tasks: the answer with the highest "
        "length-normalised log-likelihood. LAMBADA: greedy prediction of the last word.",
        documents_note(known.values()),
        *cut_notes(known),
        "The first seed of each row." if any(len(o.row.seeds) > 1 for o in outcomes) else "",
        apart_note([task.apart for of_row in found.values() for task in of_row.values()]),
        runs_note(outcomes, mean=False),
        table.note,
    )
    return {"": [make(columns, [*found.items(), ("random", chance)], *notes)]}


def tasks(outcome: Outcome) -> dict[str, Task]:
    """Return name -> result of each task, for the first seed that is there."""
    found = outcome.first["zero_shot"]["tasks"] if outcome.good else []
    return {task["task"]: read_task(task) for task in found}


def read_task(task: Mapping[str, Any]) -> Task:
    """Read a task from the output of ``fairseq-sffn zero-shot --json``."""
    kind = "" if task["accuracy_norm"] is None else "_norm"
    accuracy, error = task[f"accuracy{kind}"], task[f"standard_error{kind}"]
    counts = (task.get(name, 0) for name in ("cut_requests", "requests_in_pieces"))
    return Task(task["documents"], accuracy, error, task["random"], *counts)


def mean_accuracy(found: Mapping[str, Task]) -> float | None:
    """Return the mean accuracy of all tasks."""
    return statistics.fmean(task.accuracy for task in found.values()) if found else None


def documents_note(found: Iterable[Task]) -> str:
    """Say how many documents there are."""
    counts = [task.documents for task in found]
    if not counts:
        return ""
    least, most = f"{min(counts):,}", f"{max(counts):,}"
    return f"{most if least == most else f'{least} to {most}'} documents per task."


def cut_notes(found: Mapping[str, Task]) -> Iterable[str]:
    """Say which tasks have requests that are longer than the model's context."""
    cut = ", ".join(f"{task.cut:,} of {name}" for name, task in found.items() if task.cut)
    pieces = ", ".join(f"{t.in_pieces:,} of {name}" for name, t in found.items() if t.in_pieces)
    yield f"Requests longer than the model's context are cut on the left: {cut}." if cut else ""
    yield f"Longer continuations are scored in pieces: {pieces}." if pieces else ""


def apart_note(apart: list[bool]) -> str:
    """Say how many accuracies differ from random."""
    if not apart:
        return ""
    far = (
        "two standard errors of random guessing, sqrt(random (1 - random) / documents), from random"
    )
    if not any(apart):
        return f"None of the {len(apart)} accuracies is more than {far}."
    return (
        f"{APART} more than {far}: {sum(apart)} of {len(apart)}. All rows answer the same "
        "documents, so a deviation that most rows share, the dense model included, comes from the "
        "task, for example from the lengths of its answers."
    )
