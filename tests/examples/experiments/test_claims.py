"""Verdicts on claims."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest

from experiments.claims import (
    CONTRADICTED,
    EQUIVALENT,
    SUPPORTED,
    UNDECIDED,
    Deviation,
    Verdict,
    judge,
    markdown,
    seed_deviation,
    verdicts,
)
from experiments.files import Claim, Row
from experiments.frame import Experiments
from experiments.results import Results
from tests.examples.experiments import made

CLAIM = Claim("A beats B.", "A", "B")


def row(label: str, *perplexities: float | None, flops: float = 1.0) -> pd.DataFrame:
    """Make the runs of a row with seeds 1, 2, ...; ``None``: the result is missing."""
    test = pd.Series(perplexities, dtype=float)
    seeds = range(1, len(test) + 1)
    values = {"test": test, "seed": seeds, "done": test.notna(), "valid": 1000 / test}
    return pd.DataFrame(values).assign(label=label, flops=flops, diverged=False)


BESIDE = Deviation(3.0, 4, 2)
LEAST = 2.7764451 * 3.0
"""Least significant difference times the root of seeds / 2: 95% of t with 4 degrees of freedom."""


def verdict(
    better: tuple[float | None, ...],
    worse: tuple[float | None, ...],
    beside: Deviation | None = BESIDE,
    flops: float = 1.025,
    margin: float = 0.02,
) -> Verdict:
    runs = pd.concat([row("A", *better, flops=flops), row("B", *worse)])
    return judge(CLAIM, runs, beside, margin)


def test_the_three_verdicts() -> None:
    better, worse = (10.0, 12.0, 11.0), (20.0, 22.5, 20.5)
    assert verdict(better, worse).word == SUPPORTED
    assert verdict(worse, better).word == CONTRADICTED
    assert verdict((10.0, 12.0, 11.0), (20.0, 1.0, 11.5)).word == UNDECIDED
    found = verdict(better, worse)
    assert found.difference == pytest.approx(10)
    error = 3 * math.sqrt(2 / 3)
    assert found.markdown() == (
        "A beats B. **Supported** at this scale: test perplexity 11.0 (A, 3 seeds) against 21.0 "
        f"(B, 3 seeds), lower by 10.0 ± {error:.1f} at 2.5% more FLOPs, where 6.8 is significant."
    )
    assert "higher by 10.0 ±" in verdict(worse, better).markdown()


def test_what_verdicts_rest_on_is_said_once() -> None:
    found = verdict((10.0, 12.0, 11.0), (20.0, 22.5, 20.5))
    text = markdown([found, found], BESIDE, 0.02)
    assert text.startswith(f"- {found.markdown()}\n- {found.markdown()}\n\nRows are compared on")
    assert "deviation 3.00 that remains" in text
    assert "(2 rows with several seeds, 4 degrees of freedom)" in text
    missing = verdict((None,), (1.0,))
    for beside, verdicts_ in ((BESIDE, [missing]), (None, [found])):
        assert markdown(verdicts_, beside, 0.02) == f"- {verdicts_[0].markdown()}"


def test_two_seeds_that_agree_by_chance_decide_nothing() -> None:
    """The standard error of the two alone would be 0."""
    assert verdict((10.0, 11.0), (11.0, 12.0)).word == UNDECIDED


@pytest.mark.parametrize(("share", "equivalent"), [(0.999, False), (1.001, True)])
@pytest.mark.parametrize("difference", [-1.0, 0.0, 2.5])
def test_rows_are_equivalent_by_two_one_sided_tests(
    difference: float, share: float, equivalent: bool
) -> None:
    """The margin must exceed the difference by 95% of t with 4 degrees of freedom, one-sided."""
    low, high = (100.0,) * 3, (100.0 + difference,) * 3
    least = abs(difference) + 2.1318468 * 3.0 * math.sqrt(2 / 3)
    found = verdict(low, high, margin=share * least / high[0])
    assert found.word == (EQUIVALENT if equivalent else UNDECIDED)
    assert ("; equivalent within " in found.reason) == equivalent
    assert verdict(low, high, None, margin=0.9).word == UNDECIDED


def test_what_differs_is_not_equivalent() -> None:
    """A significant difference is not equivalent, however small it is against the margin."""
    low, high = (100.0,) * 3, (107.0,) * 3
    assert verdict(low, high, margin=0.5).word == SUPPORTED
    assert verdict(high, low, margin=0.5).word == CONTRADICTED


@pytest.mark.parametrize(("share", "word"), [(1.001, SUPPORTED), (0.999, UNDECIDED)])
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_what_decides(seeds: int, share: float, word: str) -> None:
    low = (10.0,) * seeds
    high = (10.0 + share * LEAST * math.sqrt(2 / seeds),) * seeds
    assert verdict(low, high).word == word
    assert verdict(high, low).word == (CONTRADICTED if word == SUPPORTED else UNDECIDED)


@pytest.mark.parametrize(
    ("flops", "words"),
    [
        (1.4996, "at 50.0% more FLOPs"),
        (0.9, "at 10.0% fewer FLOPs"),
        (1.0001, "at equal FLOPs"),
    ],
)
def test_flops_are_said(flops: float, words: str) -> None:
    assert f"{words}, where" in verdict((10.0,), (30.0,), flops=flops).markdown()
    assert f"{words}; the deviation" in verdict((10.0,), (30.0,), None, flops).markdown()


def test_rows_are_compared_on_the_seeds_that_both_have() -> None:
    found = verdict((10.0,), (30.0, 1.0, 1.0))
    assert found.word == SUPPORTED
    assert "10.0 (A, one seed) against 30.0 (B, one seed), lower by 20.0 ± 4.2" in found.reason
    runs = pd.concat([row("A", 10.0).assign(seed=5), row("B", 30.0)])
    apart = judge(CLAIM, runs, BESIDE, 0.02)
    assert (apart.word, apart.reason) == (UNDECIDED, "the rows have no seed in common")


def test_one_seed() -> None:
    """The deviation comes from the rows with several seeds."""
    found = verdict((10.0,), (30.0,))
    assert found.word == SUPPORTED
    assert "10.0 (A, one seed) against 30.0 (B, one seed), lower by 20.0 ± 4.2" in found.reason
    alone = verdict((10.0,), (30.0,), None)
    assert alone.word == UNDECIDED and "the deviation between seeds is not known" in alone.reason


@pytest.mark.parametrize("some", [(), (10.0, None, 11.0), (None, 10.0, 12.0)])
def test_results_are_missing(some: tuple[float | None, ...]) -> None:
    """One seed of a row may be far from the others, so there is no verdict before the last seed."""
    for found in (verdict(some, (90.0, 91.0, 92.0)), verdict((90.0, 91.0, 92.0), some)):
        assert (found.word, found.reason) == (UNDECIDED, "results are missing")


def test_a_row_that_diverged() -> None:
    runs = pd.concat([row("A", None).assign(done=True, diverged=True), row("B", 10.0)])
    assert judge(CLAIM, runs, BESIDE, 0.02).reason == "A diverged"


def test_the_deviation_is_of_each_training_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tables share rows, and some have fewer of their seeds."""
    results: Results = made.empty(tmp_path_factory.mktemp("experiments"))
    a, b, c = Row("A", "avgk", seeds=(1, 2, 3)), Row("B", "switch", seeds=(1, 2)), Row("C", "dense")
    values = {"avgk": (10.0, 12.0, 14.0), "switch": (20.0, 21.0), "dense": (30.0,)}
    made.fill(results, [a, b, c], lambda r, run: made.result(values[r.model][run.seed - 1]))
    tables = {
        "t": made.table(a, b, c, claims=(CLAIM,)),
        "u": made.table(replace(a, seeds=(2, 3)), name="u"),
    }
    experiments = Experiments(results.scale, results, tables)
    found = seed_deviation(experiments.frame)
    assert found is not None and (found.rows, found.degrees_of_freedom) == (2, 1)
    # Seeds 1 and 2 differ by 2 in one row and by 1 in the other. Only one row has seed 3.
    assert found.sd == pytest.approx(math.sqrt(4 * 0.25**2))
    (claim,) = verdicts(experiments)["t"]
    assert claim.word == SUPPORTED and "±" in claim.markdown()
    flops = experiments.runs(tables["t"]).groupby("label").flops.first()
    assert claim.flops == flops["A"] / flops["B"] != 1
    alone = Experiments(results.scale, results, {"t": made.table(c)})
    assert seed_deviation(alone.frame) is None
