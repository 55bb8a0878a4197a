"""Means, deviations, and the agreement of two models on blocks."""

import itertools

import numpy as np
import pytest
import torch

from experiments.claims import Deviation, residual_deviation
from experiments.tables.part import mean_sd
from experiments.tables.routing import correlation, shared_blocks


def test_a_mean_is_of_a_sample() -> None:
    values = [3.0, None, 4.5, 9.0]
    assert mean_sd(values, 3) == "5.500 ± 3.122"
    assert mean_sd([0.25, 0.75], 1, "%") == "50.0 ± 35.4%"
    assert mean_sd([2.0]) == "2.00"
    assert mean_sd([]) == mean_sd([None], 1, "%") == ""


def deviation(rows: list[dict[int, float]]) -> Deviation | None:
    """Return the residual deviation of rows of seed -> value."""
    found = [(i, seed, value) for i, row in enumerate(rows) for seed, value in row.items()]
    return (
        residual_deviation(*zip(*found, strict=True)) if found else residual_deviation([], [], [])
    )


def test_the_deviation_beside_rows_and_seeds() -> None:
    """The formula for a table without gaps: each value minus the means of its row and its seed,
    plus the mean of all values."""
    values = np.random.default_rng(2).normal(size=(4, 3)) * 2 + np.array([0, 50, 100])
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    rows = [dict(enumerate(row, 1)) for row in values.tolist()]
    found = deviation([*rows, {1: 7.0}])  # one value says nothing
    assert found is not None and (found.degrees_of_freedom, found.rows) == (3 * 2, 4)
    assert found.sd == pytest.approx(np.sqrt((rest**2).sum() / 6))
    less = deviation([*rows[1:], {2: 1.0, 3: 2.0}])
    assert less is not None and (less.degrees_of_freedom, less.rows) == (11 - 4 - 2, 4)
    large = deviation([{1: 1e8, 2: 1e8 + 1}, {1: 1e8, 2: 1e8 + 3}])
    assert large is not None and large.sd == pytest.approx(1)
    same = {1: 0.0, 2: 0.0}
    for few in ([], [{1: 5.0}], [same, same], rows[:1], [{1: 1.0, 2: 2.0}, {3: 3.0, 4: 5.0}]):
        assert deviation(few) is None


# Values of printed tables.
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 22: 2.074, 120: 1.980}


@pytest.mark.parametrize(("freedom", "quantile"), QUANTILES.items())
def test_the_least_significant_difference_is_a_quantile(freedom: int, quantile: float) -> None:
    assert Deviation(3.0, freedom, 2).significant(2) == pytest.approx(3 * quantile, abs=2e-3)


def test_values_that_do_not_differ_are_told_apart_in_5_of_100_cases() -> None:
    """Four rows have three seeds each. The effect of the seed is far larger than the residual."""
    generator = np.random.default_rng(1)
    draws = generator.normal(size=(500, 4, 3)) + 100 * generator.normal(size=(500, 1, 3))
    apart = 0
    for values in draws.tolist():
        beside = deviation([dict(enumerate(row)) for row in values])
        assert beside is not None
        apart += abs(np.mean(values[0]) - np.mean(values[1])) > beside.significant(seeds=3)
    assert apart / len(draws) == pytest.approx(0.05, abs=0.02)


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
    same = shared_blocks([[id] for id in ids])
    assert correlation(shared_blocks(by_token), same) == pytest.approx(expected)
    assert 0.5 < expected < 1
    constant = shared_blocks([[2]] * 6)
    assert np.isnan(correlation(constant, same))
