"""Means, deviations, and how alike two models choose."""

import itertools

import numpy as np
import pytest
import torch

from fairseq_sffn.study.statistics import (
    Summary,
    correlation,
    paired_difference,
    pooled_deviation,
    same_token,
    shared_blocks,
    summarize,
)


def test_summary_is_of_a_sample() -> None:
    values = [3.0, 4.5, 9.0]
    found = summarize(values)
    assert found is not None and found.count == 3
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    assert summarize([2.0]) == Summary(2.0, None, 1)
    assert summarize([]) is None


def test_differences_are_of_the_seeds_that_both_have() -> None:
    first, second = {1: 10.0, 2: 13.0, 3: 11.0, 5: 99.0}, {3: 10.0, 2: 9.0, 1: 8.0, 4: -99.0}
    differences = np.array([2.0, 4.0, 1.0])
    found = paired_difference(first, second)
    assert found is not None and found.count == 3
    assert found.mean == pytest.approx(differences.mean())
    assert found.error == pytest.approx(differences.std(ddof=1) / np.sqrt(3))
    single = paired_difference({1: 4.0}, {1: 3.0, 2: 0.0})
    assert single is not None and (single.mean, single.error) == (1.0, None)
    assert paired_difference({1: 4.0}, {2: 3.0}) is None


def test_pooled_deviation() -> None:
    groups = [[1.0, 2.0, 4.0], [10.0, 30.0]]
    within = sum(float(((np.array(g) - np.mean(g)) ** 2).sum()) for g in groups)
    summaries = [s for g in [*groups, [5.0]] if (s := summarize(g))]
    assert pooled_deviation(summaries) == pytest.approx(np.sqrt(within / 3))
    assert pooled_deviation([Summary(5.0, None, 1)]) is None


def by_loop(first: list[list[int]], second: list[list[int]]) -> float:
    """The overlap of two models, pair by pair."""
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
