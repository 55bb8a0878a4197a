"""Verdicts on the claims of tables, by t-tests on test perplexity."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .files import Claim, Table
from .outcomes import Experiments, Outcome, count_missing
from .plan import Run
from .summaries import (
    Deviation,
    Difference,
    difference,
    residual_deviation,
    summarize,
)
from .tables.part import text

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
EQUIVALENT = "equivalent"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim.

    Attributes:
        claim: the claim.
        flops: training FLOPs of the better row over those of the worse row.
        word: one of the four words above.
        reason: the numbers behind it.
        difference: test perplexity of the worse row minus that of the better row; ``None`` where
            there is nothing to compare.
    """

    claim: Claim
    flops: float
    word: str
    reason: str
    difference: Difference | None = None

    def markdown(self) -> str:
        """Return the claim, the verdict and the reason."""
        return f"{self.claim.text} **{self.word.capitalize()}** at this scale: {self.reason}."


def decide(found: Difference, margin: float) -> str:
    """Decide on a claim that a difference is positive; equivalent rows differ by less than a
    margin."""
    if found.significant is not None and abs(found.mean) > found.significant:
        return SUPPORTED if found.mean > 0 else CONTRADICTED
    return EQUIVALENT if found.equivalent(margin) else UNDECIDED


def judge(
    claim: Claim,
    better: Outcome,
    worse: Outcome,
    flops: float,
    deviation: Deviation | None,
    margin: float,
) -> Verdict:
    """Judge a claim by the seeds that both rows have.

    Args:
        claim: the claim.
        better, worse: outcomes of its rows.
        flops: training FLOPs of the better row over those of the worse row.
        deviation: see :func:`seed_deviation`.
        margin: share of the worse row's perplexity; equivalent rows differ by less.
    """

    def undecided(reason: str) -> Verdict:
        return Verdict(claim, flops, UNDECIDED, reason)

    for outcome in (better, worse):
        if outcome.diverged:
            return undecided(f"{text(outcome.row.label)} diverged")
    if count_missing((better, worse))[0] or not (better.runs and worse.runs):
        return undecided("results are missing")
    below, above = better.perplexity("test"), worse.perplexity("test")
    common = below.keys() & above.keys()
    low, high = (summarize(of_row[seed] for seed in common) for of_row in (below, above))
    if low is None or high is None:
        return undecided("the rows have no seed in common")
    found = difference(high, low, deviation)
    word = decide(found, margin * high.mean)
    share = abs(flops - 1)
    cost = f"{share:.1%} {'more' if flops > 1 else 'fewer'}" if share >= 0.0005 else "equal"
    seeds = "one seed" if low.count == 1 else f"{low.count} seeds"
    error = "" if found.standard_error is None else f" ± {found.standard_error:.1f}"
    reason = (
        f"test perplexity {low.mean:.1f} ({text(claim.better)}, {seeds}) against {high.mean:.1f} "
        f"({text(claim.worse)}, {seeds}), {'lower' if found.mean >= 0 else 'higher'} by "
        f"{abs(found.mean):.1f}{error} at {cost} FLOPs"
    )
    if found.significant is None:
        reason += "; the deviation between seeds is not known"
    else:
        reason += f", where {found.significant:.1f} is significant"
    if word == EQUIVALENT:
        reason += f"; equivalent within {100 * margin:g}%"
    return Verdict(claim, flops, word, reason, found)


def seed_deviation(experiments: Experiments) -> Deviation | None:
    """Return the residual deviation of test perplexity, over all tables."""
    rows: dict[Run, dict[int, float]] = {}  # by run without its seed, as tables share rows
    for table in experiments.tables.values():
        for outcome in experiments.outcomes(table):
            for run in outcome.runs[:1]:
                rows.setdefault(replace(run, seed=0), {}).update(outcome.perplexity("test"))
    return residual_deviation(rows.values())


def verdicts(experiments: Experiments, table: Table) -> list[Verdict]:
    """Judge all claims of a table."""
    if not table.claims:
        return []
    by_label = {outcome.row.label: outcome for outcome in experiments.outcomes(table)}
    deviation = seed_deviation(experiments)
    found = []
    for claim in table.claims:
        better, worse = by_label[claim.better], by_label[claim.worse]
        flops = experiments.training_flops(better) / experiments.training_flops(worse)
        found.append(judge(claim, better, worse, flops, deviation, table.margin))
    return found


def markdown(found: list[Verdict], deviation: Deviation | None, margin: float) -> str:
    """List verdicts, with a note on the tests."""
    lines = "\n".join(f"- {verdict.markdown()}" for verdict in found)
    if deviation is None or not any(verdict.difference for verdict in found):
        return lines
    return (
        f"{lines}\n\nRows are compared on their common seeds. ± is the standard error of the "
        f"difference. It is computed from the residual standard deviation {deviation.sd:.2f} that "
        f"remains after the effects of row and seed ({deviation.rows} rows with several seeds, "
        f"{deviation.degrees_of_freedom} degrees of freedom). Significance: two-sided t-test at "
        f"95%. A claim that it leaves undecided is called equivalent if two one-sided t-tests "
        f"(TOST) at 95% place the difference within {100 * margin:g}% of the worse row's "
        f"perplexity."
    )
