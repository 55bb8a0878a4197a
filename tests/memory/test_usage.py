import math

import pytest
import torch

from fairseq_sffn.memory.usage import dropped_share, load_entropy, load_max, unused_blocks

EVEN, ONE_TAKES_ALL = torch.tensor([5, 5, 5, 5]), torch.tensor([0, 20, 0, 0])
NOTHING, ONE_BLOCK = torch.zeros(4, dtype=torch.int64), torch.tensor([7])
UNEVEN = torch.tensor([1, 0, 3, 4])


@pytest.mark.parametrize(
    ("counts", "entropy", "maximum", "unused"),
    [
        (EVEN, 1.0, 1.0, 0),
        (ONE_TAKES_ALL, 0.0, 4.0, 3),
        (NOTHING, 0.0, 0.0, 4),
        (ONE_BLOCK, 1.0, 1.0, 0),
        (
            UNEVEN,
            -sum(p * math.log(p) for p in (1 / 8, 3 / 8, 4 / 8)) / math.log(4),
            2.0,
            1,
        ),
    ],
    ids=["even", "one takes all", "nothing", "one block", "uneven"],
)
def test_ratios(counts, entropy, maximum, unused):
    assert load_entropy(counts) == pytest.approx(entropy, abs=1e-6)
    assert load_max(counts) == pytest.approx(maximum)
    assert unused_blocks(counts) == unused


def test_dropped_share():
    assert dropped_share(UNEVEN, torch.tensor(2)) == pytest.approx(0.25)
    assert dropped_share(UNEVEN, torch.tensor(0)) == 0
    assert dropped_share(NOTHING, torch.tensor(0)) == 0


def test_ratios_of_large_sums():
    counts = torch.tensor([2**40, 2**40])
    assert load_entropy(counts) == pytest.approx(1.0, abs=1e-6)
    assert load_max(counts) == pytest.approx(1.0)
    assert dropped_share(counts, torch.tensor(2**40)) == pytest.approx(0.5)
