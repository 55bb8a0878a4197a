import math

import pytest
import torch

from fairseq_sffn.memory.usage import (
    dropped_share,
    load_entropy,
    load_kl,
    load_max,
    load_min,
    memory_usage,
    unused_blocks,
)
from tests.memory.cases import build, close, tokens

EVEN, ONE_TAKES_ALL = torch.tensor([5, 5, 5, 5]), torch.tensor([0, 20, 0, 0])
NOTHING, ONE_BLOCK = torch.zeros(4, dtype=torch.int64), torch.tensor([7])
UNEVEN = torch.tensor([1, 0, 3, 4])


@pytest.mark.parametrize(
    ("counts", "entropy", "maximum", "minimum", "unused"),
    [
        (EVEN, 1.0, 1.0, 1.0, 0),
        (ONE_TAKES_ALL, 0.0, 4.0, 0.0, 3),
        (NOTHING, 0.0, 0.0, 0.0, 4),
        (ONE_BLOCK, 1.0, 1.0, 1.0, 0),
        (
            UNEVEN,
            -sum(p * math.log(p) for p in (1 / 8, 3 / 8, 4 / 8)) / math.log(4),
            2.0,
            0.0,
            1,
        ),
        (
            torch.tensor([6, 2]),
            -sum(p * math.log(p) for p in (0.75, 0.25)) / math.log(2),
            1.5,
            0.5,
            0,
        ),
    ],
    ids=["even", "one takes all", "nothing", "one block", "uneven", "two blocks"],
)
def test_ratios(counts, entropy, maximum, minimum, unused):
    assert load_entropy(counts) == pytest.approx(entropy, abs=1e-6)
    assert load_max(counts) == pytest.approx(maximum)
    assert load_min(counts) == pytest.approx(minimum)
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


@pytest.mark.parametrize(
    ("counts", "usage"), [(EVEN, 1.0), (ONE_TAKES_ALL, 0.25), (NOTHING, 0.0), (ONE_BLOCK, 1.0)]
)
def test_memory_usage(counts, usage):
    assert memory_usage(counts) == pytest.approx(usage)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 2.5, 1e12])
@pytest.mark.parametrize(
    ("shares", "divergence"),
    [
        ([0.25] * 4, 0.0),
        ([0.0, 1.0, 0.0, 0.0], math.log(4)),
        ([1.0], 0.0),
        ([0.5, 0.5, 0.0, 0.0], math.log(2)),
        ([0.1, 0.2, 0.3, 0.4], sum(p * math.log(4 * p) for p in (0.1, 0.2, 0.3, 0.4))),
    ],
)
def test_load_kl(shares, divergence, scale):
    assert load_kl(scale * torch.tensor(shares)) == pytest.approx(divergence, abs=1e-6)


def test_load_kl_of_counts_is_what_the_entropy_lacks():
    counts = torch.randint(1, 50, (16,))
    assert load_kl(counts) == pytest.approx((1 - load_entropy(counts)) * math.log(16))
    assert load_kl(NOTHING) == 0


# Counts of the memory


@pytest.mark.parametrize("case", ["avgk-g4", "vanilla_m-g1", "pkm-activation", "hash_layer"])
def test_importance_without_weights_is_the_counts(case):
    out = build(case, gate="none")(*tokens(20))
    assert torch.equal(out.usage.importance, out.usage.counts.float())


def test_importance_is_what_weights_and_coefficients_add_up_to():
    memory, (x, _) = build("pkm", gate="softmax"), tokens(20)
    padding_mask = torch.arange(20) < 5
    out = memory(x, padding_mask=padding_mask)
    factors_NA = (out.selection.weights * out.selection.coefficients)[~padding_mask]
    wanted = torch.zeros(12, dtype=torch.float64)
    wanted.index_add_(0, out.selection.blocks[~padding_mask].flatten(), factors_NA.flatten())
    close(out.usage.importance.double(), wanted, tolerance=1e-6)
    assert not out.usage.importance.requires_grad


def test_importance_of_softmax_coefficients_is_the_tokens_times_heads():
    assert build("pkm")(tokens(20)[0]).usage.importance.sum() == pytest.approx(40, abs=1e-4)


def test_the_capacity_changes_neither_counts_nor_importance():
    plain, limited = build("gshard"), build("gshard", capacity_factor=0.5)
    limited.load_state_dict(plain.state_dict())
    x, _ = tokens(20)
    outs = [plain(x), limited(x)]
    assert outs[1].usage.dropped > 0
    assert torch.equal(outs[0].usage.counts, outs[1].usage.counts)
    close(outs[0].usage.importance, outs[1].usage.importance)
