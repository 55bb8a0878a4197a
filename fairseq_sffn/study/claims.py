"""What a study's figures say to the claims that its tables bear on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .outcomes import Outcome, Study, count_missing
from .plan import Cell, Claim, Table
from .statistics import Deviation, Difference, Summary, difference, pooled_deviation, summarize
from .tables.part import text

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"


@dataclass(frozen=True)
class Verdict:
    """What the figures say to a claim.

    Attributes:
        claim: that it is on.
        flops: training FLOPs of the better row over those of the worse one.
        word: one of the three above.
        reason: the figures that it follows from.
        difference: test perplexity of the worse row minus that of the better one; ``None``:
            nothing to compare.
    """

    claim: Claim
    flops: float
    word: str
    reason: str
    difference: Difference | None = None

    def markdown(self) -> str:
        """The claim and what becomes of it."""
        return f"{self.claim.text} **{self.word.capitalize()}** at this scale: {self.reason}."


def decide(found: Difference) -> str:
    """The verdict on a difference that should be positive."""
    if found.least is None or abs(found.mean) <= found.least:
        return UNDECIDED
    return SUPPORTED if found.mean > 0 else CONTRADICTED


def judge(
    claim: Claim, better: Outcome, worse: Outcome, flops: float, within: Deviation | None
) -> Verdict:
    """The verdict on a claim.

    Args:
        claim: that the one row has lower perplexity than the other.
        better, worse: the rows.
        flops: training FLOPs of the better row over those of the worse one.
        within: of perplexity between the seeds of a row; ``None``: not known.
    """
    for outcome in (better, worse):
        if outcome.diverged:
            return Verdict(claim, flops, UNDECIDED, f"{text(outcome.row.label)} diverged")
    low, high = (summarize(o.perplexity("test").values()) for o in (better, worse))
    gone, _ = count_missing((better, worse))
    if low is None or high is None or gone:
        return Verdict(claim, flops, UNDECIDED, "results are missing")
    found = difference(high, low, within)
    return Verdict(claim, flops, decide(found), compared(claim, low, high, found, flops), found)


def compared(claim: Claim, better: Summary, worse: Summary, found: Difference, flops: float) -> str:
    """The two perplexities, means of seeds, and their difference beside what is significant."""
    share = abs(flops - 1)
    cost = f"{share:.1%} {'more' if flops > 1 else 'fewer'}" if share >= 0.0005 else "equal"
    figures = (
        f"test perplexity {better.mean:.1f} ({text(claim.better)}, {seeds(better)}) against "
        f"{worse.mean:.1f} ({text(claim.worse)}, {seeds(worse)}), "
        f"{'lower' if found.mean >= 0 else 'higher'} by {abs(found.mean):.1f}"
    )
    if found.error is None or found.least is None:
        return f"{figures} at {cost} FLOPs; the deviation between seeds is not known"
    return f"{figures} ± {found.error:.1f} at {cost} FLOPs, where {found.least:.1f} is significant"


def seeds(row: Summary) -> str:
    """How many a mean is of."""
    return "one seed" if row.count == 1 else f"{row.count} seeds"


def seed_deviation(study: Study) -> Deviation | None:
    """Deviation of test perplexity between the seeds of a row, pooled over the study's rows that
    have several; ``None``: none has."""
    rows: dict[Cell, dict[int, float]] = {}  # by training but for the seed: tables share rows
    for table in study.tables.values():
        for outcome in study.outcomes(table):
            for cell in outcome.cells[:1]:
                rows.setdefault(replace(cell, seed=0), {}).update(outcome.perplexity("test"))
    return pooled_deviation(filter(None, (summarize(row.values()) for row in rows.values())))


def verdicts(study: Study, table: Table) -> list[Verdict]:
    """Of all claims of a table."""
    if not table.claims:
        return []
    by_label = {outcome.row.label: outcome for outcome in study.outcomes(table)}
    within = seed_deviation(study)
    found = []
    for claim in table.claims:
        better, worse = by_label[claim.better], by_label[claim.worse]
        flops = study.training_flops(better) / study.training_flops(worse)
        found.append(judge(claim, better, worse, flops, within))
    return found


def markdown(found: list[Verdict], within: Deviation | None) -> str:
    """A list of verdicts, and what they rest on."""
    lines = "\n".join(f"- {verdict.markdown()}" for verdict in found)
    if within is None or not any(verdict.difference for verdict in found):
        return lines
    return (
        f"{lines}\n\n± is the standard error of the difference, from the standard deviation "
        f"{within.sd:.2f} between the seeds of a row (pooled over {within.groups} rows, "
        f"{within.freedom} degrees of freedom); significant is what exceeds the two-sided 95% "
        "quantile of Student's t."
    )
