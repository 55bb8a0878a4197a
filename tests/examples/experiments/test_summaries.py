"""Means, deviations, and the agreement of two models on blocks."""

import itertools
import statistics

import numpy as np
import pytest
import torch

from experiments.summaries import (
    Deviation,
    Difference,
    Summary,
    correlation,
    difference,
    residual_deviation,
    same_token,
    shared_blocks,
    summarize,
    t_quantile,
)


def test_summary_is_of_a_sample() -> None:
    values = [3.0, 4.5, 9.0]
    found = summarize(values)
    assert found is not None and found.count == 3
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    assert summarize([2.0]) == Summary(2.0, None, 1)
    assert summarize([]) is None


def test_the_deviation_beside_rows_and_seeds() -> None:
    """The formula for a table without gaps: each value minus the means of its row and its seed,
    plus the mean of all values."""
    values = np.random.default_rng(2).normal(size=(4, 3)) * 2 + np.array([0, 50, 100])
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    rows = [dict(enumerate(row, 1)) for row in values.tolist()]
    found = residual_deviation([*rows, {1: 7.0}])  # one value says nothing
    assert found is not None and (found.degrees_of_freedom, found.rows) == (3 * 2, 4)
    assert found.sd == pytest.approx(np.sqrt((rest**2).sum() / 6))
    less = residual_deviation([*rows[1:], {2: 1.0, 3: 2.0}])
    assert less is not None and (less.degrees_of_freedom, less.rows) == (11 - 4 - 2, 4)
    large = residual_deviation([{1: 1e8, 2: 1e8 + 1}, {1: 1e8, 2: 1e8 + 3}])
    assert large is not None and large.sd == pytest.approx(1)
    for few in ([], [{1: 5.0}], rows[:1], [{1: 1.0, 2: 2.0}, {3: 3.0, 4: 5.0}]):
        assert residual_deviation(few) is None


def test_a_difference_of_means() -> None:
    first, second = Summary(10.0, 99.0, 3), Summary(7.0, None, 3)
    found = difference(first, second, Deviation(2.0, 22, 11))
    error = 2 * np.sqrt(2 / 3)  # the deviation of all rows, not of these two
    assert found.mean == 3 and found.standard_error == pytest.approx(error)
    assert found.significant == pytest.approx(2.0738731 * error)
    assert difference(first, second, None) == Difference(3.0)


# Values of printed tables.
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 22: 2.074, 120: 1.980}


@pytest.mark.parametrize(("freedom", "quantile"), QUANTILES.items())
def test_the_quantile_of_students_t(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-4)


def test_the_quantile_of_another_share_and_of_many_values() -> None:
    assert t_quantile(5, 0.99) == pytest.approx(4.032, abs=5e-4)
    assert t_quantile(20000) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=2e-4)


def test_values_that_do_not_differ_are_told_apart_in_5_of_100_cases() -> None:
    """Four rows have three seeds each. The effect of the seed is far larger than the residual."""
    generator = np.random.default_rng(1)
    draws = generator.normal(size=(2000, 4, 3)) + 100 * generator.normal(size=(2000, 1, 3))
    apart = 0
    for values in draws.tolist():
        first, second = (s for row in values[:2] if (s := summarize(row)))
        found = difference(first, second, residual_deviation(dict(enumerate(r)) for r in values))
        assert found.significant is not None
        apart += abs(found.mean) > found.significant
    assert apart / len(draws) == pytest.approx(0.05, abs=0.015)


def by_loop(first: list[list[int]], second: list[list[int]]) -> float:
    """Compute the overlap of two models, pair of positions by pair of positions."""
    shares = [
        [len(set(blocks[i]) & set(blocks[j])) / len(blocks[i]) for blocks in (first, second)]
        for i, j in itertools.combinations(range(len(first)), 2)
    ]
    return float(np.corrcoef(np.array(shares).T)[0, 1])


def draw(seed: int, positions: int = 12, blocks: int = 9, active: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(positions, blocks, generator=generator).argsort(1)
    return order[:, :active].tolist()


def test_overlap_is_the_correlation_of_what_pairs_share() -> None:
    first, second = draw(1), draw(2)
    found = correlation(shared_blocks(first), shared_blocks(second))
    assert found == pytest.approx(by_loop(first, second))
    assert shared_blocks(first).diagonal().tolist() == [1.0] * 12


def test_overlap_does_not_see_how_blocks_are_numbered() -> None:
    blocks = draw(3)
    numbers = torch.randperm(9).tolist()
    renamed = [[numbers[block] for block in row[::-1]] for row in blocks]
    assert correlation(shared_blocks(blocks), shared_blocks(renamed)) == pytest.approx(1)


def test_overlap_with_tokens() -> None:
    ids = [4, 7, 4, 4, 9, 7]
    by_token = [[id % 5] for id in ids]  # 4 and 9 have the same block
    expected = by_loop(by_token, [[id] for id in ids])
    assert correlation(shared_blocks(by_token), same_token(ids)) == pytest.approx(expected)
    assert 0.5 < expected < 1
    constant = shared_blocks([[2]] * 6)
    assert correlation(constant, same_token(ids)) is None
