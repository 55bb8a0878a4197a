"""What a study's figures say to the claims that its tables bear on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .outcomes import Outcome, Study
from .plan import Claim, Table
from .statistics import Difference, paired_difference, pooled_deviation, summarize

SUPPORTS, CONTRADICTS, UNDECIDED = "supports", "contradicts", "does not decide"


@dataclass(frozen=True)
class Verdict:
    """What the figures say to a claim.

    Attributes:
        claim: that it is on.
        word: one of the three above.
        reason: the figures that it follows from.
        difference: test perplexity of the worse row minus that of the better one; ``None``:
            nothing to compare.
    """

    claim: Claim
    word: str
    reason: str
    difference: Difference | None = None

    def markdown(self) -> str:
        """A sentence."""
        return f"{self.claim.text} This scale **{self.word}** it: {self.reason}."


def decide(mean: float, error: float) -> str:
    """The verdict on a difference that should be positive."""
    if abs(mean) <= 2 * error:
        return UNDECIDED
    return SUPPORTS if mean > 0 else CONTRADICTS


def judge(
    claim: Claim, better: Outcome, worse: Outcome, yardstick: tuple[float, int] | None
) -> Verdict:
    """The verdict on a claim.

    Args:
        claim: that the one row has lower perplexity than the other.
        better, worse: the rows.
        yardstick: standard deviation between the seeds of a row, of how many rows, for where rows
            share a single seed; ``None``: not known.
    """
    for outcome in (better, worse):
        if outcome.diverged:
            return Verdict(claim, UNDECIDED, f"{outcome.row.label} diverged")
    first, second = worse.perplexity("test"), better.perplexity("test")
    difference = paired_difference(first, second)
    if difference is None:
        return Verdict(claim, UNDECIDED, "results are missing")
    figures = compared(claim, first, second, difference)
    if difference.error is not None:
        word = decide(difference.mean, difference.error)
        reason = (
            f"{figures} ± {difference.error:.2f} (standard error of {difference.count} seeds, "
            f"paired), {_size(word)} two standard errors"
        )
        return Verdict(claim, word, reason, difference)
    reason = f"{figures}; one seed: no deviation known"
    if yardstick is None:
        return Verdict(claim, UNDECIDED, reason, difference)
    deviation, rows = yardstick
    error = math.sqrt(2) * deviation
    word = decide(difference.mean, error)
    reason += (
        f". By that of the {rows} rows of the study that have several seeds, {deviation:.2f}, a "
        f"difference has standard error {error:.2f}, and this one is {_size(word)} two of it"
    )
    return Verdict(claim, word, reason, difference)


def compared(
    claim: Claim, worse: Mapping[int, float], better: Mapping[int, float], difference: Difference
) -> str:
    """The two perplexities, means of the seeds that both have, and their difference."""
    shared = sorted(worse.keys() & better.keys())
    low, high = (sum(found[seed] for seed in shared) / len(shared) for found in (better, worse))
    return (
        f"test perplexity {low:.2f} ({claim.better}) against {high:.2f} ({claim.worse}), "
        f"{'lower' if difference.mean >= 0 else 'higher'} by {abs(difference.mean):.2f}"
    )


def _size(word: str) -> str:
    return "not more than" if word == UNDECIDED else "more than"


def seed_deviation(study: Study) -> tuple[float, int] | None:
    """Standard deviation of test perplexity between the seeds of a row, pooled over the study's
    rows that have several, and how many these are; ``None``: none has."""
    summaries = {}
    for table in study.tables.values():
        for outcome in study.outcomes(table):
            found = summarize(outcome.perplexity("test").values())
            if found is not None and found.sd is not None:
                summaries[outcome.cells] = found  # tables have rows in common
    deviation = pooled_deviation(summaries.values())
    return None if deviation is None else (deviation, len(summaries))


def verdicts(study: Study, table: Table) -> list[Verdict]:
    """Of all claims of a table."""
    by_label = {outcome.row.label: outcome for outcome in study.outcomes(table)}
    yardstick = seed_deviation(study) if table.claims else None
    return [
        judge(claim, by_label[claim.better], by_label[claim.worse], yardstick)
        for claim in table.claims
    ]


def markdown(found: list[Verdict]) -> str:
    """A list of verdicts."""
    return "\n".join(f"- {verdict.markdown()}" for verdict in found)
