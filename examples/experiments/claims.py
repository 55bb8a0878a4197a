"""Verdicts on the claims of tables, by t-tests on test perplexity."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from .files import Claim
from .frame import Experiments
from .tables.part import text

CONFIDENCE = 0.95
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
EQUIVALENT = "equivalent"


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
        return float(stdtrit(self.degrees_of_freedom, (1 + CONFIDENCE) / 2)) * self.error(seeds)

    def equivalent(self, difference: float, margin: float, seeds: int) -> bool:
        """Return whether two one-sided t-tests (TOST) place a difference within ± margin."""
        far = (abs(difference) - margin) / self.error(seeds)
        return bool(stdtr(self.degrees_of_freedom, far) < 1 - CONFIDENCE)


def seed_deviation(frame: pd.DataFrame) -> Deviation | None:
    """Return the residual deviation of test perplexity over all runs. A run that several tables
    have counts once."""
    runs = frame[frame.test.notna() & ~frame.sweep].drop_duplicates("run")
    rows = [replace(run, seed=0) for run in runs.run]
    return residual_deviation(pd.Series(rows).factorize()[0], runs.seed, runs.test)


def residual_deviation(row: object, seed: object, value: object) -> Deviation | None:
    """Fit the effects of row and seed on values by least squares. A seed selects the training text,
    so its effect is common to all rows. ``None`` where no degree of freedom is left."""
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
    return Deviation(math.sqrt(variance), degrees, data.row.nunique())


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim."""

    claim: Claim
    flops: float  # training FLOPs of the better row over those of the worse row
    word: str  # one of the four words above
    reason: str  # the numbers behind it
    difference: float | None = None  # worse row minus better row; None: not known

    def markdown(self) -> str:
        """Return the claim, the verdict and the reason."""
        return f"{self.claim.text} **{self.word.capitalize()}** at this scale: {self.reason}."


def judge(claim: Claim, runs: pd.DataFrame, deviation: Deviation | None, margin: float) -> Verdict:
    """Judge a claim by the seeds that both rows have.

    Args:
        claim: the claim.
        runs: runs of the claim's table.
        deviation: see :func:`seed_deviation`.
        margin: share of the worse row's perplexity; equivalent rows differ by less.
    """
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
    low, high, count = pairs.test_low.mean(), pairs.test_high.mean(), len(pairs)
    share = abs(flops - 1)
    cost = f"{share:.1%} {'more' if flops > 1 else 'fewer'}" if share >= 0.0005 else "equal"
    seeds = "one seed" if count == 1 else f"{count} seeds"
    values = (
        f"test perplexity {low:.1f} ({text(claim.better)}, {seeds}) against {high:.1f} "
        f"({text(claim.worse)}, {seeds}), {'lower' if high >= low else 'higher'} by "
        f"{abs(high - low):.1f}"
    )
    if deviation is None:
        reason = f"{values} at {cost} FLOPs; the deviation between seeds is not known"
        return Verdict(claim, flops, UNDECIDED, reason)
    difference, significant = high - low, deviation.significant(count)
    reason = f"{values} ± {deviation.error(count):.1f} at {cost} FLOPs"
    reason += f", where {significant:.1f} is significant"
    if abs(difference) > significant:
        word = SUPPORTED if difference > 0 else CONTRADICTED
    elif deviation.equivalent(difference, margin * high, count):
        word, reason = EQUIVALENT, f"{reason}; equivalent within {100 * margin:g}%"
    else:
        word = UNDECIDED
    return Verdict(claim, flops, word, reason, difference)


def verdicts(experiments: Experiments) -> dict[str, list[Verdict]]:
    """Judge the claims of all tables. The deviation is the same for all of them."""
    deviation = seed_deviation(experiments.frame)
    return {
        name: [judge(one, experiments.runs(table), deviation, table.margin) for one in table.claims]
        for name, table in experiments.tables.items()
    }


def markdown(found: list[Verdict], deviation: Deviation | None, margin: float) -> str:
    """List verdicts, with a note on the tests."""
    lines = "\n".join(f"- {verdict.markdown()}" for verdict in found)
    if deviation is None or not any(verdict.difference is not None for verdict in found):
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
