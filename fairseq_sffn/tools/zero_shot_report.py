"""The table that ``fairseq-sffn zero-shot`` prints."""

from __future__ import annotations

from typing import Any

from .cost import align


def format_report(report: dict[str, Any]) -> str:
    """Return a table of the tasks, and notes on long requests, as text."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{share:.1%}"

    def accuracy(share: float | None, error: float | None) -> str:
        return percent(share) + ("" if error is None else f" ± {percent(error)}")

    rows = [["", "documents", "accuracy", "by character", "random", "perplexity"]]
    for figures in report["tasks"]:
        perplexity = figures["perplexity"]
        rows.append(
            [
                figures["task"],
                f"{figures['documents']:,} of {figures['documents_of_task']:,}",
                accuracy(figures["accuracy"], figures["standard_error"]),
                accuracy(figures["accuracy_norm"], figures["standard_error_norm"]),
                percent(figures["random"]),
                "" if perplexity is None else f"{perplexity:,.1f}",
            ]
        )
    title = f"{report['checkpoint']}: zero-shot, seed {report['seed']}"
    notes = list(filter(None, map(length_note, report["tasks"])))
    lines = [title, "", *(line.rstrip() for line in align(rows))]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def length_note(figures: dict[str, Any]) -> str:
    """Return how many requests of a task are longer than the model's context; empty: none."""
    cut, pieces = figures["cut_requests"], figures["requests_in_pieces"]
    if not cut:
        return ""
    note = (
        f"{figures['task']}: {cut:,} of {figures['requests']:,} requests are longer than the "
        "model's context and cut at the left"
    )
    if pieces:
        note += (
            f"; {pieces:,} have a continuation that is longer by itself and is scored in pieces, "
            "where lm-evaluation-harness stops"
        )
    return note
