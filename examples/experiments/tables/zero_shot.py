"""Tables of accuracy on zero-shot tasks."""

from typing import Any

import pandas as pd

from ..files import Table
from ..frame import Experiments
from .part import Part, Parts, runs_note, shown, text

APART = "†"
"""Marks accuracies that differ from random."""


def zero_shot(experiments: Experiments, table: Table) -> Parts:
    """Make a table of accuracy, for the first seed of each row."""
    runs = experiments.runs(table)
    tasks = accuracies(runs)
    known = tasks.drop_duplicates("task", keep="last")
    random = known.assign(label="random", accuracy=known.random, error=None, apart=False)
    accuracy = pd.concat([tasks, random]).astype({"accuracy": float})
    lines = [*dict.fromkeys(runs.label), "random"]
    cells = {"model": [text(label) for label in lines]}
    for name, task in accuracy.groupby("task", sort=False):
        found = dict(zip(task.label, task.itertuples(), strict=True))
        cells[name] = [markdown(found[label]) if label in found else "" for label in lines]
    means = accuracy.groupby("label").accuracy.mean().reindex(lines)
    cells["mean"] = shown(means, lambda mean: f"{100 * mean:.1f}")
    notes = [
        "Accuracy in % ± standard error. Multiple-choice tasks: the answer with the highest "
        "length-normalised log-likelihood. LAMBADA: greedy prediction of the last word.",
        *documents_notes(known),
        "The first seed of each row." if runs.label.duplicated().any() else "",
        apart_note(tasks),
        runs_note(runs, mean=False),
        table.note,
    ]
    return {"": [Part(cells, notes)]}


def accuracies(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each row and task, from the row's first seed: what ``fairseq-sffn
    zero-shot --json`` says, with ``accuracy`` and its standard ``error`` by length-normalised
    likelihood where there are choices, and whether the accuracy is ``apart`` from random."""
    first = runs[runs.done & ~runs.diverged].drop_duplicates("label")
    found = [
        {"label": run.label, "cut_requests": 0, "requests_in_pieces": 0, **task}
        for run in first.itertuples()
        for task in run.result["zero_shot"]["tasks"]
    ]
    names = ("label", "task", "documents", "random", "cut_requests", "requests_in_pieces")
    measures = ("accuracy", "accuracy_norm", "standard_error", "standard_error_norm")
    tasks = pd.DataFrame(found, columns=[*names, *measures])
    choices = tasks.accuracy_norm.notna()
    tasks["error"] = tasks.standard_error_norm.where(choices, tasks.standard_error)
    tasks["accuracy"] = tasks.accuracy_norm.where(choices, tasks.accuracy)
    tasks["apart"] = apart(tasks.accuracy, tasks.random, tasks.documents)
    return tasks


def apart(accuracy: pd.Series, random: pd.Series, documents: pd.Series) -> pd.Series:
    """Return whether accuracies differ from random by more than two standard errors of random
    guessing. Their own standard error is 0 where all or no documents are right."""
    return (accuracy - random).abs() > 2 * (random * (1 - random) / documents) ** 0.5


def markdown(task: Any) -> str:
    """Return an accuracy in %, with a mark where it differs from random."""
    error = "" if pd.isna(task.error) else f" ± {100 * task.error:.1f}"
    return f"{100 * task.accuracy:.1f}{error}" + APART * task.apart


def documents_notes(known: pd.DataFrame) -> list[str]:
    """Say how many documents there are, and which requests are longer than the model's context."""
    if known.empty:
        return []
    ends = dict.fromkeys(f"{n:,}" for n in (known.documents.min(), known.documents.max()))
    notes = [f"{' to '.join(ends)} documents per task."]
    for column, said in (
        ("cut_requests", "Requests longer than the model's context are cut on the left"),
        ("requests_in_pieces", "Longer continuations are scored in pieces"),
    ):
        some = known[known[column] > 0]
        if found := ", ".join(
            f"{n:,} of {task}" for n, task in some[[column, "task"]].itertuples(index=False)
        ):
            notes.append(f"{said}: {found}.")
    return notes


def apart_note(tasks: pd.DataFrame) -> str:
    """Say how many accuracies differ from random."""
    if tasks.empty:
        return ""
    far = (
        "two standard errors of random guessing, sqrt(random (1 - random) / documents), from random"
    )
    if not tasks.apart.any():
        return f"None of the {len(tasks)} accuracies is more than {far}."
    return (
        f"{APART} more than {far}: {tasks.apart.sum()} of {len(tasks)}. All rows answer the same "
        "documents, so a deviation that most rows share, the dense model included, comes from the "
        "task, for example from the lengths of its answers."
    )
