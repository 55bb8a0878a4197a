"""Verdicts on the claims of tables, by t-tests on log test perplexity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from .files import Claim
from .frame import ROW, Experiments
from .tables.part import text

LEVEL = 0.05
"""Level of significance; intervals have a confidence of 95%."""
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
EQUIVALENT = "equivalent"


def percent(difference: float) -> float:
    """Convert log(worse) - log(better) to the difference in percent of the worse perplexity."""
    return -100 * math.expm1(-difference)


class Deviation(NamedTuple):
    """Residual standard deviation after the effects of row and seed, assumed equal for all rows."""

    sd: float  # root of the residual variance
    degrees_of_freedom: int
    rows: int  # with several seeds

    def error(self, seeds: int) -> float:
        """Return the standard error of a difference of two means over the same seeds."""
        return self.sd * math.sqrt(2 / seeds)

    def significant(self, seeds: int) -> float:
        """Return the least absolute difference that a two-sided t-test finds."""
        return float(stdtrit(self.degrees_of_freedom, 1 - LEVEL / 2)) * self.error(seeds)

    def p_value(self, difference: float, seeds: int) -> float:
        """Return the p-value of a two-sided t-test that there is no difference."""
        return 2 * float(stdtr(self.degrees_of_freedom, -abs(difference) / self.error(seeds)))

    def equivalent(self, difference: float, margin: float, seeds: int) -> bool:
        """Return whether two one-sided t-tests (TOST) place a difference within ± margin."""
        far = (abs(difference) - margin) / self.error(seeds)
        return bool(stdtr(self.degrees_of_freedom, far) < LEVEL)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, by Holm's step-down method."""
    adjusted, greatest = [1.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, i in enumerate(order):
        greatest = max(greatest, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, greatest)
    return adjusted


def seed_deviation(frame: pd.DataFrame) -> Deviation | None:
    """Return the residual deviation of log test perplexity over all runs. A run that several
    tables have counts once."""
    runs = frame[frame.test.notna() & (frame.stage == ROW)].drop_duplicates("run")
    rows = [replace(run, seed=0) for run in runs.run]
    return residual_deviation(pd.Series(rows).factorize()[0], runs.seed, np.log(runs.test))


def residual_deviation(row: object, seed: object, value: object) -> Deviation | None:
    """Fit the effects of row and seed on values by least squares. A seed selects the training text,
    so its effect is common to all rows. ``None`` where no degree of freedom or no deviation is
    left."""
    data = pd.DataFrame({"row": row, "seed": seed, "value": value}).dropna().reset_index(drop=True)
    data = data[data.groupby("row").seed.transform("size") > 1]  # one value is fitted exactly
    if data.empty:
        return None
    effects = pd.get_dummies(data, columns=["row", "seed"], dtype=float).drop(columns="value")
    fit, _, rank, _ = np.linalg.lstsq(effects, data.value)
    degrees = len(data) - int(rank)
    if not degrees:
        return None
    variance = float(np.square(data.value - effects @ fit).sum()) / degrees
    return Deviation(math.sqrt(variance), degrees, data.row.nunique()) if variance else None


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim."""

    claim: Claim
    flops: float  # training FLOPs of the better row over those of the worse row
    word: str  # one of the four words above
    reason: str  # the numbers behind it
    difference: float | None = None  # log perplexity of the worse row minus the better row's
    p: float | None = None  # of the two-sided t-test; None: the claim cannot be tested
    adjusted_p: float | None = None  # by Holm's correction over the claims of the table

    def markdown(self) -> str:
        """Return the claim, the verdict and the reason."""
        return f"{self.claim.text} **{self.word.capitalize()}** at this scale: {self.reason}."


def judge(
    claims: Sequence[Claim], runs: pd.DataFrame, deviation: Deviation | None, margin: float
) -> list[Verdict]:
    """Judge the claims of a table.

    Args:
        claims: the claims.
        runs: runs of the table.
        deviation: see :func:`seed_deviation`.
        margin: equivalent rows have no perplexity that is below the other's by this share.
    """
    found = [compare(claim, runs, deviation, margin) for claim in claims]
    tested = {i: verdict.p for i, verdict in enumerate(found) if verdict.p is not None}
    adjusted = holm([*tested.values()])
    for i, adjusted_p in zip(tested, adjusted, strict=True):
        found[i] = corrected(found[i], adjusted_p, len(tested))
    return found


def compare(
    claim: Claim, runs: pd.DataFrame, deviation: Deviation | None, margin: float
) -> Verdict:
    """Judge a claim alone, by the seeds that both rows have."""
    better, worse = (runs[runs.label == label] for label in (claim.better, claim.worse))
    flops = better.flops.max() / worse.flops.max()
    for row in (better, worse):
        if row.diverged.any():
            return Verdict(claim, flops, UNDECIDED, f"{text(row.label.iloc[0])} diverged")
    if better.empty or worse.empty or not (better.done.all() and worse.done.all()):
        return Verdict(claim, flops, UNDECIDED, "results are missing")
    pairs = better.merge(worse, on="seed", suffixes=("_low", "_high"))
    if pairs.empty:
        return Verdict(claim, flops, UNDECIDED, "the rows have no seed in common")
    count, difference = len(pairs), float(np.log(pairs.test_high / pairs.test_low).mean())
    share = abs(flops - 1)
    cost = f"{share:.1%} {'more' if flops > 1 else 'fewer'}" if share >= 0.0005 else "equal"
    seeds = "one seed" if count == 1 else f"{count} seeds"
    sign = 1 if difference >= 0 else -1
    reason = (
        f"test perplexity {pairs.test_low.mean():.1f} ({text(claim.better)}, {seeds}) against "
        f"{pairs.test_high.mean():.1f} ({text(claim.worse)}, {seeds}), "
        f"{'lower' if sign > 0 else 'higher'} by {sign * percent(difference):.1f}%"
    )
    if deviation is None:
        reason += f" at {cost} FLOPs; the deviation between seeds is not known"
        return Verdict(claim, flops, UNDECIDED, reason, difference)
    p, least = deviation.p_value(difference, count), deviation.significant(count)
    claimed = -math.log1p(-(claim.effect or 0.0))
    outside = claim.effect is not None and abs(difference - claimed) > least
    if outside:
        p = deviation.p_value(difference - claimed, count)
    low, high = sorted(sign * percent(difference + end) for end in (-least, least))
    reason += (
        f" ± {percent(deviation.error(count)):.1f}% (95% interval {low:z.1f}% to {high:z.1f}%) "
        f"at {cost} FLOPs, where {percent(least):.1f}% is significant alone; "
        f"{f'p = {p:.2g}' if p >= 0.0001 else 'p < 0.0001'}"
        f"{f' that it is {claim.effect:.1%} lower' if outside else ''}"
    )
    if outside:
        word = CONTRADICTED
    elif p < LEVEL:
        word = SUPPORTED if difference > 0 else CONTRADICTED
    elif deviation.equivalent(difference, -math.log(1 - margin), count):
        word, reason = EQUIVALENT, f"{reason}, equivalent within {100 * margin:g}%"
    else:
        word = UNDECIDED
    return Verdict(claim, flops, word, reason, difference, p)


def corrected(verdict: Verdict, adjusted_p: float, claims: int) -> Verdict:
    """Correct a verdict for the number of claims that are tested."""
    verdict = replace(verdict, adjusted_p=adjusted_p)
    if verdict.word not in (SUPPORTED, CONTRADICTED) or adjusted_p < LEVEL:
        return verdict
    reason = f"{verdict.reason}, not significant after Holm's correction over {claims} claims"
    return replace(verdict, word=UNDECIDED, reason=reason)


def verdicts(experiments: Experiments) -> dict[str, list[Verdict]]:
    """Judge the claims of all tables. The deviation is the same for all of them."""
    deviation = seed_deviation(experiments.frame)
    return {
        name: judge(table.claims, experiments.runs(table), deviation, table.margin)
        for name, table in experiments.tables.items()
    }


def markdown(found: list[Verdict], deviation: Deviation | None, margin: float) -> str:
    """List verdicts, with a note on the tests."""
    lines = "\n".join(f"- {verdict.markdown()}" for verdict in found)
    tested = sum(verdict.p is not None for verdict in found)
    if deviation is None or not tested:
        return lines
    correction = f" A verdict holds after Holm's correction over {tested} claims."
    return (
        f"{lines}\n\nRows are compared on their common seeds, by the difference of mean log "
        f"perplexity, in percent of the worse row's perplexity. ± is its standard error. It is "
        f"computed from the residual standard deviation {deviation.sd:.4f} of log test perplexity "
        f"that remains after the effects of row and seed ({deviation.rows} rows with several "
        f"seeds, {deviation.degrees_of_freedom} degrees of freedom). Significance: two-sided "
        f"t-test at 5%.{correction if tested > 1 else ''} A claim whose difference is not "
        f"significant alone is called equivalent if two one-sided t-tests (TOST) at 5% show that "
        f"neither row's perplexity is {100 * margin:g}% or more below the other's."
    )
