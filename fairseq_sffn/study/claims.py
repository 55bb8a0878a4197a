"""What a study's figures say to the claims that its tables bear on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .outcomes import Outcome, Study, count_missing
from .plan import Cell, Claim, Table
from .statistics import Deviation, Difference, Summary, difference, residual_deviation, summarize
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
    if found.significant is None or abs(found.mean) <= found.significant:
        return UNDECIDED
    return SUPPORTED if found.mean > 0 else CONTRADICTED


def judge(
    claim: Claim, better: Outcome, worse: Outcome, flops: float, beside: Deviation | None
) -> Verdict:
    """The verdict on a claim, by the seeds that both rows have.

    Args:
        claim: that the one row has lower perplexity than the other.
        better, worse: the rows.
        flops: training FLOPs of the better row over those of the worse one.
        beside: see :func:`seed_deviation`.
    """
    for outcome in (better, worse):
        if outcome.diverged:
            return Verdict(claim, flops, UNDECIDED, f"{text(outcome.row.label)} diverged")
    if count_missing((better, worse))[0] or not (better.cells and worse.cells):
        return Verdict(claim, flops, UNDECIDED, "results are missing")
    below, above = better.perplexity("test"), worse.perplexity("test")
    common = below.keys() & above.keys()
    low, high = (summarize(of_row[seed] for seed in common) for of_row in (below, above))
    if low is None or high is None:
        return Verdict(claim, flops, UNDECIDED, "the rows have no seed in common")
    found = difference(high, low, beside)
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
    if found.standard_error is None or found.significant is None:
        return f"{figures} at {cost} FLOPs; the deviation between seeds is not known"
    return (
        f"{figures} ± {found.standard_error:.1f} at {cost} FLOPs, where {found.significant:.1f} is "
        "significant"
    )


def seeds(row: Summary) -> str:
    """How many a mean is of."""
    return "one seed" if row.count == 1 else f"{row.count} seeds"


def seed_deviation(study: Study) -> Deviation | None:
    """Deviation of test perplexity beside the effects of row and seed, of the study's rows that
    have several seeds; ``None``: too few have."""
    rows: dict[Cell, dict[int, float]] = {}  # by training but for the seed: tables share rows
    for table in study.tables.values():
        for outcome in study.outcomes(table):
            for cell in outcome.cells[:1]:
                rows.setdefault(replace(cell, seed=0), {}).update(outcome.perplexity("test"))
    return residual_deviation(rows.values())


def verdicts(study: Study, table: Table) -> list[Verdict]:
    """Of all claims of a table."""
    if not table.claims:
        return []
    by_label = {outcome.row.label: outcome for outcome in study.outcomes(table)}
    beside = seed_deviation(study)
    found = []
    for claim in table.claims:
        better, worse = by_label[claim.better], by_label[claim.worse]
        flops = study.training_flops(better) / study.training_flops(worse)
        found.append(judge(claim, better, worse, flops, beside))
    return found


def markdown(found: list[Verdict], beside: Deviation | None) -> str:
    """A list of verdicts, and what they rest on."""
    lines = "\n".join(f"- {verdict.markdown()}" for verdict in found)
    if beside is None or not any(verdict.difference for verdict in found):
        return lines
    return (
        f"{lines}\n\nRows are compared on the seeds that both have. ± is the standard error of the "
        f"difference, from the standard deviation {beside.sd:.2f} that is left beside the effects "
        f"of row and seed (of {beside.rows} rows with several seeds, {beside.degrees_of_freedom} "
        "degrees of freedom); significant is what exceeds Student's t at 95%, two-sided."
    )
