"""Verdicts on claims."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from experiments.claims import (
    CONTRADICTED,
    EQUIVALENT,
    SUPPORTED,
    UNDECIDED,
    Deviation,
    Verdict,
    holm,
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


BESIDE = Deviation(0.03, 4, 2)
LEAST = 2.7764451 * 0.03
"""Least significant difference times the root of seeds / 2: 95% of t with 4 degrees of freedom."""
ONE_SIDED = 2.1318468 * 0.03


def verdict(
    better: tuple[float | None, ...],
    worse: tuple[float | None, ...],
    beside: Deviation | None = BESIDE,
    flops: float = 1.025,
    margin: float = 0.01,
) -> Verdict:
    runs = pd.concat([row("A", *better, flops=flops), row("B", *worse)])
    (found,) = judge([CLAIM], runs, beside, margin)
    return found


def test_the_three_verdicts() -> None:
    better, worse = (10.0, 12.0, 11.0), (20.0, 22.5, 20.5)
    assert verdict(better, worse).word == SUPPORTED
    assert verdict(worse, better).word == CONTRADICTED
    assert verdict((10.0, 12.0, 11.0), (10.5, 11.4, 11.2)).word == UNDECIDED
    found = verdict(better, worse)
    difference = sum(math.log(b / a) for a, b in zip(better, worse, strict=True)) / 3
    assert found.difference == pytest.approx(difference)
    error = 0.03 * math.sqrt(2 / 3)
    low, high = (100 - 100 * math.exp(-difference + i * 2.7764451 * error) for i in (1, -1))
    assert found.markdown() == (
        "A beats B. **Supported** at this scale: test perplexity 11.0 (A, 3 seeds) against 21.0 "
        f"(B, 3 seeds), lower by {100 - 100 * math.exp(-difference):.1f}% ± 2.4% (95% interval "
        f"{low:.1f}% to {high:.1f}%) at 2.5% more FLOPs, where 6.6% is significant alone; "
        "p < 0.0001."
    )
    more = 100 * math.exp(difference) - 100
    low, high = (100 * math.exp(difference + i * 2.7764451 * error) - 100 for i in (-1, 1))
    reason = f"higher by {more:.1f}% ± 2.4% (95% interval {low:.1f}% to {high:.1f}%) at 2.5% more"
    assert reason in verdict(worse, better).reason


def test_what_verdicts_rest_on_is_said_once() -> None:
    found = verdict((10.0, 12.0, 11.0), (20.0, 22.5, 20.5))
    text = markdown([found, found], BESIDE, 0.02)
    assert text.startswith(f"- {found.markdown()}\n- {found.markdown()}\n\nRows are compared on")
    assert "deviation 0.0300 of log test perplexity that remains" in text
    assert "(2 rows with several seeds, 4 degrees of freedom)" in text
    assert "Holm's correction over 2 claims" in text and "is 2% or more below" in text
    assert "Holm" not in markdown([found], BESIDE, 0.02)
    missing = verdict((None,), (1.0,))
    assert "Holm" not in markdown([found, missing], BESIDE, 0.02)
    unknown = verdict((10.0,), (20.0,), None)
    for beside, verdicts_ in ((BESIDE, [missing]), (None, [found]), (BESIDE, [unknown])):
        assert markdown(verdicts_, beside, 0.02) == f"- {verdicts_[0].markdown()}"


def test_two_seeds_that_agree_by_chance_decide_nothing() -> None:
    """The standard error of the two alone would be 0."""
    assert verdict((10.0, 11.0), (10.5, 11.55)).word == UNDECIDED


@pytest.mark.parametrize(("share", "equivalent"), [(0.999, False), (1.001, True)])
@pytest.mark.parametrize("difference", [-0.01, 0.0, 0.025])
@pytest.mark.parametrize("seeds", [1, 3])
def test_rows_are_equivalent_by_two_one_sided_tests(
    seeds: int, difference: float, share: float, equivalent: bool
) -> None:
    """The margin of log perplexity must exceed the difference by 95% of t with 4 degrees of
    freedom, one-sided. A margin m is log(1 / (1 - m)) there, in both directions."""
    low, high = (100.0,) * seeds, (100.0 * math.exp(difference),) * seeds
    least = abs(difference) + ONE_SIDED * math.sqrt(2 / seeds)
    found = verdict(low, high, margin=1 - math.exp(-share * least))
    assert found.word == (EQUIVALENT if equivalent else UNDECIDED)
    assert (", equivalent within " in found.reason) == equivalent
    assert verdict(low, high, None, margin=0.9).word == UNDECIDED


def test_the_margin_is_one_percent_of_perplexity() -> None:
    """Equal rows are equivalent if the one-sided quantile of their difference is within it."""
    margin = made.table(Row("A", "dense")).margin
    bound = math.log(100 / 99)
    for share, word in ((0.999, EQUIVALENT), (1.001, UNDECIDED)):
        beside = Deviation(share * bound / (2.1318468 * math.sqrt(2)), 4, 2)
        assert verdict((50.0,), (50.0,), beside, margin=margin).word == word


def test_what_differs_is_not_equivalent() -> None:
    """A significant difference is not equivalent, however small it is against the margin."""
    low, high = (100.0,) * 3, (107.1,) * 3
    assert verdict(low, high, margin=0.5).word == SUPPORTED
    assert verdict(high, low, margin=0.5).word == CONTRADICTED


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(
    ("difference", "word"),
    [
        # In units of the half-width of the interval around the claimed difference of 4.
        *((5.001, CONTRADICTED), (4.999, SUPPORTED), (3.001, SUPPORTED), (2.999, CONTRADICTED)),
        *((0.5, CONTRADICTED), (-1.5, CONTRADICTED)),
    ],
)
def test_a_claimed_effect_is_within_the_interval(difference: float, word: str, seeds: int) -> None:
    half = LEAST * math.sqrt(2 / seeds)
    claim = replace(CLAIM, effect=1 - math.exp(-4 * half))
    runs = pd.concat(
        [row("A", *[100.0] * seeds), row("B", *[100 * math.exp(difference * half)] * seeds)]
    )
    (found,) = judge([claim], runs, BESIDE, 0.001)
    assert found.word == word
    beyond = 0.0 if word == SUPPORTED else 4
    assert found.p == pytest.approx(BESIDE.p_value((difference - beyond) * half, seeds))
    assert found.reason.endswith(f"that it is {claim.effect:.1%} lower") == (word == CONTRADICTED)


def test_an_effect_that_is_near_none_is_undecided() -> None:
    claim = replace(CLAIM, effect=0.01)
    runs = pd.concat([row("A", 100.0), row("B", 100.5)])
    (found,) = judge([claim], runs, BESIDE, 0.001)
    assert found.word == UNDECIDED and "that it is" not in found.reason


@pytest.mark.parametrize(("share", "word"), [(1.001, SUPPORTED), (0.999, UNDECIDED)])
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_what_decides(seeds: int, share: float, word: str) -> None:
    low = (10.0,) * seeds
    high = (10.0 * math.exp(share * LEAST * math.sqrt(2 / seeds)),) * seeds
    assert verdict(low, high).word == word
    assert verdict(high, low).word == (CONTRADICTED if word == SUPPORTED else UNDECIDED)


def test_p_values_are_those_of_students_distribution() -> None:
    """With one degree of freedom, the distribution is Cauchy's; with two it is known, too."""
    for t in (-3.0, 0.0, 0.7, 12.0):
        error = 0.03 * math.sqrt(2 / 3)
        one = Deviation(0.03, 1, 2).p_value(t * error, 3)
        two = Deviation(0.03, 2, 2).p_value(t * error, 3)
        assert one == pytest.approx(1 - 2 * math.atan(abs(t)) / math.pi)
        assert two == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t))
    found = verdict((10.0,) * 3, (10.1,) * 3)
    assert found.p == pytest.approx(BESIDE.p_value(math.log(1.01), 3))
    assert f"; p = {found.p:.2g}" in found.reason


def test_holms_correction() -> None:
    """The example is computed by hand. The second smallest has 3 competitors, but may not fall
    below the smallest; the largest has none, but may not fall below the third."""
    assert holm([0.03, 0.01, 0.04, 0.012]) == pytest.approx([0.06, 0.04, 0.06, 0.04])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3)
    assert holm([0.2]) == [0.2] and holm([]) == []


def by_loop(p_values: list[float]) -> list[bool]:
    """Reject hypotheses step by step, until one cannot be rejected."""
    left = dict(enumerate(p_values))
    while left:
        least = min(left, key=left.__getitem__)
        if left[least] >= 0.05 / len(left):
            break
        del left[least]
    return [i not in left for i in range(len(p_values))]


def test_holm_rejects_what_the_steps_reject() -> None:
    generator = np.random.default_rng(1)
    counts = set()
    for size in (1, 2, 3, 8):
        for _ in range(100):
            p_values = (generator.random(size) ** 4).tolist()
            rejected = [p < 0.05 for p in holm(p_values)]
            assert rejected == by_loop(p_values)
            counts.add((size, sum(rejected)))
    assert {(8, 0), (8, 3), (8, 5), (3, 2)} < counts


def test_verdicts_hold_after_the_correction_over_a_table() -> None:
    """Claims that cannot be tested are not counted."""
    pairs = {"A": 3.0, "B": -2.6, "C": 1.0, "D": None}
    deviation = Deviation(0.01, 1000, 2)
    rows, claims = [], []
    for name, t in pairs.items():
        worse = None if t is None else 50 * math.exp(t * deviation.error(1))
        rows += [row(name, 50.0), row(f"{name}2", worse)]
        claims.append(Claim(f"{name}.", name, f"{name}2"))
    a, b, c, d = judge(claims, pd.concat(rows), deviation, 0.001)
    assert [one.word for one in (a, b, c, d)] == [SUPPORTED, CONTRADICTED, UNDECIDED, UNDECIDED]
    assert a.p is not None and b.p is not None and d.p is d.adjusted_p is None
    assert a.adjusted_p == pytest.approx(3 * a.p) and b.adjusted_p == pytest.approx(2 * b.p)
    assert "Holm" not in f"{a.reason}{b.reason}{c.reason}{d.reason}"

    again = judge(
        [*claims, claims[1], claims[1], claims[1], claims[1]], pd.concat(rows), deviation, 0.1
    )
    assert [one.word for one in again] == [SUPPORTED] + [UNDECIDED, EQUIVALENT] + [UNDECIDED] * 5
    words = f"; p = {b.p:.2g}, not significant after Holm's correction over 7 claims"
    assert again[1].reason.endswith(words)
    assert again[1].adjusted_p == pytest.approx(6 * b.p)


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
    assert "10.0 (A, one seed) against 30.0 (B, one seed), lower by 66.7% ± 4.2% (" in found.reason
    runs = pd.concat([row("A", 10.0).assign(seed=5), row("B", 30.0)])
    apart = judge([CLAIM], runs, BESIDE, 0.02)[0]
    assert (apart.word, apart.reason) == (UNDECIDED, "the rows have no seed in common")


def test_one_seed() -> None:
    """The deviation comes from the rows with several seeds."""
    found = verdict((10.0,), (30.0,))
    assert found.word == SUPPORTED
    assert "10.0 (A, one seed) against 30.0 (B, one seed), lower by 66.7% ± 4.2% (" in found.reason
    alone = verdict((10.0,), (30.0,), None)
    assert alone.word == UNDECIDED and "the deviation between seeds is not known" in alone.reason


@pytest.mark.parametrize("some", [(), (10.0, None, 11.0), (None, 10.0, 12.0)])
def test_results_are_missing(some: tuple[float | None, ...]) -> None:
    """One seed of a row may be far from the others, so there is no verdict before the last seed."""
    for found in (verdict(some, (90.0, 91.0, 92.0)), verdict((90.0, 91.0, 92.0), some)):
        assert (found.word, found.reason) == (UNDECIDED, "results are missing")


def test_a_row_that_diverged() -> None:
    runs = pd.concat([row("A", None).assign(done=True, diverged=True), row("B", 10.0)])
    assert judge([CLAIM], runs, BESIDE, 0.02)[0].reason == "A diverged"


def test_the_deviation_is_of_each_training_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tables share rows, and some have fewer of their seeds."""
    results: Results = made.empty(tmp_path_factory.mktemp("experiments"))
    a, b, c = Row("A", "avgk", seeds=(1, 2, 3)), Row("B", "switch", seeds=(1, 2)), Row("C", "dense")
    logs = {"avgk": (1.0, 1.2, 1.4), "switch": (2.0, 2.1), "dense": (3.0,)}
    values = {model: [math.exp(log) for log in found] for model, found in logs.items()}
    made.fill(results, [a, b, c], lambda r, run: made.result(values[r.model][run.seed - 1]))
    tables = {
        "t": made.table(a, b, c, claims=(CLAIM,)),
        "u": made.table(replace(a, seeds=(2, 3)), name="u"),
    }
    experiments = Experiments(results.scale, results, tables)
    found = seed_deviation(experiments.frame)
    assert found is not None and (found.rows, found.degrees_of_freedom) == (2, 1)
    # Seeds 1 and 2 differ by 0.2 in one row and by 0.1 in the other. Only one row has seed 3.
    assert found.sd == pytest.approx(math.sqrt(4 * 0.025**2))
    (claim,) = verdicts(experiments)["t"]
    assert claim.word == SUPPORTED and "±" in claim.markdown()
    flops = experiments.runs(tables["t"]).groupby("label").flops.first()
    assert claim.flops == flops["A"] / flops["B"] != 1
    alone = Experiments(results.scale, results, {"t": made.table(c)})
    assert seed_deviation(alone.frame) is None
