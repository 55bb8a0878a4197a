"""Verdicts on the claims of tables, by t-tests on test perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from .files import Claim, Table
from .frame import Experiments
from .tables.part import text

CONFIDENCE = 0.95
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
EQUIVALENT = "equivalent"


class Deviation(NamedTuple):
    """Residual standard deviation after the effects of row and seed, assumed equal for all rows.

    Attributes:
        sd: root of the residual variance.
        degrees_of_freedom: degrees of freedom of the residuals.
        rows: number of rows with several seeds.
    """

    sd: float
    degrees_of_freedom: int
    rows: int


def seed_deviation(frame: pd.DataFrame) -> Deviation | None:
    """Return the residual deviation of test perplexity over all runs. A run that several tables
    have counts once."""
    runs = frame[frame.test.notna() & ~frame.sweep].drop_duplicates("run")
    rows = [replace(run, seed=0) for run in runs.run]
    return residual_deviation(pd.Series(rows).factorize()[0], runs.seed, runs.test)


def residual_deviation(row: object, seed: object, value: object) -> Deviation | None:
    """Fit the effects of row and seed by least squares. A seed selects the training text, so its
    effect is common to all rows.

    Args:
        row, seed, value: columns; a line for each run.

    Returns:
        The residual deviation; ``None`` where no degree of freedom is left.
    """
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
class Difference:
    """A difference of two means over the same seeds, and its t-tests.

    Attributes:
        mean: the difference.
        standard_error: its standard error.
        degrees_of_freedom: degrees of freedom of the standard error.
    """

    mean: float
    standard_error: float
    degrees_of_freedom: int

    @property
    def significant(self) -> float:
        """The least absolute difference that a two-sided test at ``CONFIDENCE`` finds."""
        return float(stdtrit(self.degrees_of_freedom, (1 + CONFIDENCE) / 2)) * self.standard_error

    def equivalent(self, margin: float) -> bool:
        """Return whether two one-sided tests (TOST) place the difference within ± margin."""
        far = (abs(self.mean) - margin) / self.standard_error
        return bool(stdtr(self.degrees_of_freedom, far) < 1 - CONFIDENCE)


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim.

    Attributes:
        claim: the claim.
        flops: training FLOPs of the better row over those of the worse row.
        word: one of the four words above.
        reason: the numbers behind it.
        difference: test perplexity of the worse row minus that of the better row; ``None`` where
            it or its error is not known.
    """

    claim: Claim
    flops: float
    word: str
    reason: str
    difference: Difference | None = None

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
    error = deviation.sd * math.sqrt(2 / count)
    found = Difference(high - low, error, deviation.degrees_of_freedom)
    reason = f"{values} ± {error:.1f} at {cost} FLOPs, where {found.significant:.1f} is significant"
    if abs(found.mean) > found.significant:
        word = SUPPORTED if found.mean > 0 else CONTRADICTED
    elif found.equivalent(margin * high):
        word, reason = EQUIVALENT, f"{reason}; equivalent within {100 * margin:g}%"
    else:
        word = UNDECIDED
    return Verdict(claim, flops, word, reason, found)


def verdicts(experiments: Experiments, table: Table) -> list[Verdict]:
    """Judge all claims of a table."""
    runs, deviation = experiments.runs(table), seed_deviation(experiments.frame)
    return [judge(claim, runs, deviation, table.margin) for claim in table.claims]


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
