"""What figures say to claims."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from study import made

from fairseq_sffn.study.claims import (
    CONTRADICTED,
    SUPPORTED,
    UNDECIDED,
    Verdict,
    judge,
    markdown,
    seed_deviation,
    verdicts,
)
from fairseq_sffn.study.outcomes import Outcome, Study
from fairseq_sffn.study.plan import Claim, Row, row_cells
from fairseq_sffn.study.results import Results
from fairseq_sffn.study.statistics import Deviation

CLAIM = Claim("A beats B.", "A", "B")


def outcome(label: str, *perplexities: float | None) -> Outcome:
    """Of seeds 1, 2, ...; ``None``: that one is missing."""
    seeds = tuple(range(1, len(perplexities) + 1))
    row = Row(label, "avgk", f"--sffn-block-size {2 ** (ord(label) - 60)}", seeds)
    results = {
        seed: made.result(value, valid=1000 / value)  # validation would say the opposite
        for seed, value in enumerate(perplexities, 1)
        if value is not None
    }
    return Outcome(row, 0.1, tuple(row_cells(row, made.scale(), 0.1)), results)


WITHIN = Deviation(3.0, 4, 2)
LEAST = 2.7764451 * 3.0
"""That decides between two seeds, times the root of the sum of 1 / seeds: 95% of t with 4 degrees
of freedom."""


def verdict(
    better: tuple[float | None, ...],
    worse: tuple[float | None, ...],
    within: Deviation | None = WITHIN,
    flops: float = 1.025,
) -> Verdict:
    return judge(CLAIM, outcome("A", *better), outcome("B", *worse), flops, within)


def test_the_three_verdicts() -> None:
    better, worse = (10.0, 12.0, 11.0), (20.0, 22.5, 20.5)
    assert verdict(better, worse).word == SUPPORTED
    assert verdict(worse, better).word == CONTRADICTED
    assert verdict((10.0, 12.0, 11.0), (20.0, 1.0, 11.5)).word == UNDECIDED
    found = verdict(better, worse)
    assert found.difference is not None and found.difference.mean == pytest.approx(10)
    error = 3 * math.sqrt(2 / 3)
    assert found.markdown() == (
        "A beats B. **Supported** at this scale: test perplexity 11.0 (A, 3 seeds) against 21.0 "
        f"(B, 3 seeds), lower by 10.0 ± {error:.1f} at 2.5% more FLOPs, where 6.8 is significant."
    )
    assert "higher by 10.0 ±" in verdict(worse, better).markdown()


def test_what_verdicts_rest_on_is_said_once() -> None:
    found = verdict((10.0, 12.0, 11.0), (20.0, 22.5, 20.5))
    text = markdown([found, found], WITHIN)
    assert text.startswith(f"- {found.markdown()}\n- {found.markdown()}\n\n± is the standard error")
    assert "deviation 3.00 between the seeds of a row (pooled over 2 rows, 4 degrees" in text
    missing = verdict((), ())
    for within, verdicts_ in ((WITHIN, [missing]), (None, [found])):
        assert markdown(verdicts_, within) == f"- {verdicts_[0].markdown()}"


def test_two_seeds_that_agree_by_chance_decide_nothing() -> None:
    """Their own standard error would be 0."""
    assert verdict((10.0, 11.0), (11.0, 12.0)).word == UNDECIDED


@pytest.mark.parametrize(("share", "word"), [(1.001, SUPPORTED), (0.999, UNDECIDED)])
@pytest.mark.parametrize("seeds", [(2, 2), (3, 3), (1, 3), (1, 1)])
def test_what_decides(seeds: tuple[int, int], share: float, word: str) -> None:
    first, second = seeds
    low = (10.0,) * first
    high = (10.0 + share * LEAST * math.sqrt(1 / first + 1 / second),) * second
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


def test_one_seed() -> None:
    """Its deviation is that of the rows that have several."""
    found = verdict((10.0,), (30.0,))
    assert found.word == SUPPORTED
    assert "10.0 (A, one seed) against 30.0 (B, one seed), lower by 20.0 ± 4.2" in found.reason
    alone = verdict((10.0,), (30.0,), None)
    assert alone.word == UNDECIDED and "the deviation between seeds is not known" in alone.reason


@pytest.mark.parametrize("some", [(), (10.0, None, 11.0), (None, 10.0, 12.0)])
def test_results_are_missing(some: tuple[float | None, ...]) -> None:
    """One seed of a row may be far from the others, so there is no verdict before the last."""
    for found in (verdict(some, (90.0, 91.0, 92.0)), verdict((90.0, 91.0, 92.0), some)):
        assert (found.word, found.reason) == (UNDECIDED, "results are missing")


def test_a_row_that_diverged() -> None:
    gone = outcome("A", 10.0)
    gone.results[1]["evaluation"] = made.diverged()["evaluation"]
    assert judge(CLAIM, gone, outcome("B", 10.0), 1.0, WITHIN).reason == "A diverged"


def test_the_deviation_is_of_each_training_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tables have rows in common, some with fewer of their seeds."""
    results: Results = made.empty(tmp_path_factory.mktemp("study"))
    a, b, c = Row("A", "avgk", seeds=(1, 2, 3)), Row("B", "switch", seeds=(1, 2)), Row("C", "dense")
    values = {"avgk": (10.0, 12.0, 14.0), "switch": (20.0, 21.0), "dense": (30.0,)}
    made.fill(results, [a, b, c], lambda r, cell: made.result(values[r.model][cell.seed - 1]))
    tables = {"t": made.table(a, b, c, claims=(CLAIM,)), "u": made.table(replace(a, seeds=(2, 3)))}
    study = Study(results.scale, results, tables)
    found = seed_deviation(study)
    assert found is not None and (found.groups, found.freedom) == (2, 3)
    assert found.sd == pytest.approx(math.sqrt((8.0 + 0.5) / 3))
    (claim,) = verdicts(study, tables["t"])
    assert claim.word == SUPPORTED and "±" in claim.markdown()
    avgk, switch = map(study.training_flops, study.outcomes(tables["t"])[:2])
    assert claim.flops == avgk / switch
    assert seed_deviation(Study(results.scale, results, {"t": made.table(c)})) is None
