"""What figures say to claims."""

from __future__ import annotations

import math

import pytest
from study import made

from fairseq_sffn.study.claims import (
    CONTRADICTS,
    SUPPORTS,
    UNDECIDED,
    Verdict,
    judge,
    seed_deviation,
    verdicts,
)
from fairseq_sffn.study.outcomes import Outcome, Study
from fairseq_sffn.study.plan import Claim, Row, row_cells
from fairseq_sffn.study.results import Results

CLAIM = Claim("A beats B.", "A", "B")


def outcome(label: str, *perplexities: float | None) -> Outcome:
    """Of seeds 1, 2, ...; ``None``: that one is missing."""
    row = Row(label, "avgk", f"--sffn-block-size {2 ** (ord(label) - 60)}")
    results = {
        seed: made.result(value, valid=1000 / value)  # validation would say the opposite
        for seed, value in enumerate(perplexities, 1)
        if value is not None
    }
    return Outcome(row, 0.1, tuple(row_cells(row, made.scale(), 0.1)), results)


def verdict(
    better: tuple[float | None, ...],
    worse: tuple[float | None, ...],
    yardstick: tuple[float, int] | None = None,
) -> Verdict:
    return judge(CLAIM, outcome("A", *better), outcome("B", *worse), yardstick)


def test_the_three_verdicts() -> None:
    better, worse = (10.0, 12.0, 11.0), (20.0, 22.5, 20.5)  # differences 10, 10.5, 9.5
    assert verdict(better, worse).word == SUPPORTS
    assert verdict(worse, better).word == CONTRADICTS
    assert verdict((10.0, 12.0, 11.0), (20.0, 1.0, 11.5)).word == UNDECIDED
    found = verdict(better, worse)
    assert found.difference is not None and found.difference.mean == pytest.approx(10)
    error = 0.5 / math.sqrt(3)
    assert found.markdown() == (
        "A beats B. This scale **supports** it: test perplexity 11.00 (A) against 21.00 (B), "
        f"lower by 10.00 ± {error:.2f} (standard error of 3 seeds, paired), more than two standard "
        "errors."
    )
    assert "higher by 10.00 ±" in verdict(worse, better).markdown()


def test_seeds_are_paired() -> None:
    """What seeds have in common cancels: unpaired, these deviations would hide the difference."""
    assert verdict((10.0, 50.0, 90.0), (11.0, 51.0, 91.1)).word == SUPPORTS
    found = verdict((10.0, None, 90.0), (11.0, 3.0, 91.1))
    assert found.difference is not None and found.difference.count == 2


@pytest.mark.parametrize(("mean", "word"), [(2.01, SUPPORTS), (1.99, UNDECIDED)])
def test_two_standard_errors_decide(mean: float, word: str) -> None:
    half = (
        math.sqrt(2) / 2
    )  # two differences, mean +- half: standard error half * sqrt(2) / sqrt(2)
    worse = (10 + mean * half - half, 10 + mean * half + half)
    found = verdict((10.0, 10.0), worse)
    assert found.difference is not None and found.difference.error == pytest.approx(half)
    assert found.word == word
    assert verdict(worse, (10.0, 10.0)).word == (CONTRADICTS if word == SUPPORTS else UNDECIDED)


def test_one_seed() -> None:
    alone = verdict((10.0,), (20.0,))
    assert alone.word == UNDECIDED and "one seed: no deviation known" in alone.reason
    by_others = verdict((10.0,), (20.0,), (3.0, 11))
    assert by_others.word == SUPPORTS  # 10 > 2 * sqrt(2) * 3
    assert "one seed: no deviation known" in by_others.reason
    assert "the 11 rows of the study that have several seeds, 3.00" in by_others.reason
    assert "standard error 4.24, and this one is more than two" in by_others.reason
    assert verdict((10.0,), (20.0,), (4.0, 11)).word == UNDECIDED
    assert verdict((20.0,), (10.0,), (3.0, 11)).word == CONTRADICTS


def test_no_results() -> None:
    found = verdict((), (10.0, 11.0), (3.0, 11))
    assert (found.word, found.reason) == (UNDECIDED, "results are missing")
    gone = outcome("A", 10.0)
    gone.results[1]["evaluation"] = made.diverged()["evaluation"]
    assert judge(CLAIM, gone, outcome("B", 10.0), None).reason == "A diverged"


def test_the_yardstick_is_of_each_training_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tables have rows in common."""
    results: Results = made.empty(tmp_path_factory.mktemp("study"))
    a, b, c = Row("A", "avgk", seeds=(1, 2, 3)), Row("B", "switch", seeds=(1, 2)), Row("C", "dense")
    values = {"avgk": (10.0, 12.0, 14.0), "switch": (20.0, 21.0), "dense": (30.0,)}
    made.fill(results, [a, b, c], lambda r, cell: made.result(values[r.model][cell.seed - 1]))
    tables = {"t": made.table(a, b, c, claims=(CLAIM,)), "u": made.table(a)}
    study = Study(results.scale, results, tables)
    found = seed_deviation(study)
    assert found is not None and found[1] == 2
    assert found[0] == pytest.approx(math.sqrt((8.0 + 0.5) / 3))
    assert [v.word for v in verdicts(study, tables["t"])] == [SUPPORTS]
    assert seed_deviation(Study(results.scale, results, {"t": made.table(c)})) is None
