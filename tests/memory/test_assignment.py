import pytest
import torch

from fairseq_sffn.memory import assignment
from fairseq_sffn.memory.assignment import balanced_assignment
from tests.memory.oracle_methods import assert_balanced

SCORES = {
    "normal": torch.randn,
    "integers": lambda N, B: torch.randint(3, (N, B)).double(),
    "one-hot": lambda N, B: torch.eye(B)[torch.randint(B, (N,))],
    "rank 1": lambda N, B: torch.randn(N, 1) * torch.randn(1, B),
    "sums": lambda N, B: torch.randn(N, 1) + torch.randn(1, B),
    "products": lambda N, B: (torch.arange(N)[:, None] * torch.arange(B)).double(),
    "geometric": lambda N, B: 2.0 ** -torch.arange(B).double() * torch.rand(N, 1),
    "alike rows": lambda N, B: torch.randn(1, B).repeat(N, 1),
    "nearly alike rows": lambda N, B: torch.randn(1, B) + 1e-3 * torch.randn(N, B),
    "alike columns": lambda N, B: torch.randn(N, 1).repeat(1, B),
    "one block best": lambda N, B: torch.randn(N, B) + 20.0 * (torch.arange(B) == B - 1),
    "one block worst": lambda N, B: torch.randn(N, B) - 1e12 * (torch.arange(B) == 0),
    "one huge score": lambda N, B: torch.randn(N, B) + 1e6 * torch.eye(N)[:, :1],
    "heavy tails": lambda N, B: torch.randn(N, B) / torch.randn(N, B),
}


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"),
    [(1, 1), (9, 1), (1, 6), (4, 6), (6, 6), (7, 6), (11, 6), (60, 5), (61, 5), (64, 5)],
)
@pytest.mark.parametrize("kind", SCORES)
def test_balanced_and_near_the_best(kind, num_tokens, num_blocks):
    scores_NB = SCORES[kind](num_tokens, num_blocks)
    assert_balanced(balanced_assignment(scores_NB), scores_NB)


@pytest.mark.parametrize("kind", SCORES)
def test_many_tokens(kind):
    scores_NB = SCORES[kind](250, 24)
    assert_balanced(balanced_assignment(scores_NB), scores_NB)


@pytest.mark.parametrize("seed", range(20))
def test_any_size(seed):
    torch.manual_seed(seed)
    num_tokens, num_blocks = (int(torch.randint(1, high, (1,))) for high in (15, 9))
    for kind in SCORES:
        scores_NB = SCORES[kind](num_tokens, num_blocks)
        assert_balanced(balanced_assignment(scores_NB), scores_NB)


def test_the_tolerance_is_kept_to():
    scores_NB = torch.randint(100, (40, 8)).double()
    # Sums of integers within less than 1 of the best sum are the best.
    tolerance = 0.9 / (40 * float(scores_NB.std(correction=0)))
    blocks_N = balanced_assignment(scores_NB, tolerance)
    for other in (tolerance / 10, tolerance / 100):
        other_N = balanced_assignment(scores_NB, other)
        sums = [scores_NB.gather(1, b.unsqueeze(1)).sum() for b in (blocks_N, other_N)]
        assert sums[0] == sums[1]


def test_no_tokens():
    assert balanced_assignment(torch.empty(0, 4)).shape == (0,)
    assert balanced_assignment(torch.empty(0, 4)).dtype == torch.int64


@pytest.mark.parametrize("value", [0.0, -3.0, 0.1, 1e30])
def test_all_equal_scores(value):
    scores_NB = torch.full((11, 4), value)
    assert_balanced(balanced_assignment(scores_NB), scores_NB)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["one", "row", "column", "everywhere"])
def test_what_is_not_finite_counts_as_zero(where, value):
    scores_NB = torch.randn(13, 4)
    places = {"one": (3, 2), "row": 3, "column": (slice(None), 2), "everywhere": slice(None)}
    scores_NB[places[where]] = value
    zeroed_NB = scores_NB.where(scores_NB.isfinite(), 0.0)
    blocks_N = balanced_assignment(scores_NB)
    assert torch.equal(blocks_N, balanced_assignment(zeroed_NB))
    assert_balanced(blocks_N, zeroed_NB)


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-600, 2.0**-100, 2.0**100, 2.0**1020])
def test_scale_does_not_matter(scale):
    scores_NB = torch.randn(50, 6).double()
    blocks_N = balanced_assignment(scores_NB)
    assert_balanced(blocks_N, scores_NB)
    assert torch.equal(balanced_assignment(scores_NB * scale), blocks_N)


@pytest.mark.parametrize("shift", [-1e3, 1e9, 1e15])
def test_shifted_scores(shift):
    scores_NB = torch.randn(50, 6).double() + shift
    assert_balanced(balanced_assignment(scores_NB), scores_NB)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_other_dtypes(dtype):
    scores_NB = (100 * torch.randn(50, 6)).to(dtype).requires_grad_()
    blocks_N = balanced_assignment(scores_NB)
    assert_balanced(blocks_N, scores_NB.detach())
    assert torch.equal(blocks_N, balanced_assignment(scores_NB))


def test_the_order_of_the_tokens_does_not_matter():
    scores_NB = torch.randn(40, 5)
    order_N = torch.randperm(40)
    blocks_N = balanced_assignment(scores_NB)
    assert torch.equal(balanced_assignment(scores_NB[order_N]), blocks_N[order_N])


def test_scores_are_left_as_they_are():
    scores_NB = torch.randn(20, 4, dtype=torch.float64)
    scores_NB[0, 0] = float("nan")
    before = scores_NB.clone()
    balanced_assignment(scores_NB)
    assert torch.equal(scores_NB.nan_to_num(), before.nan_to_num())
    assert scores_NB[0, 0].isnan()


@pytest.mark.parametrize("rounds", [0, 1, 3, 1000])
@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 5), (7, 7), (24, 4), (23, 5), (40, 9)])
def test_what_waits_after_few_rounds_is_inserted_as_well(
    num_tokens, num_blocks, rounds, monkeypatch
):
    """The bound holds wherever the auction stops, and for equal tokens too."""
    monkeypatch.setattr(assignment, "ROUNDS", rounds)
    for alike in (1, 4, num_tokens):
        rows_NB = torch.randn(alike, num_blocks)[torch.randint(alike, (num_tokens,))]
        scores_NB = rows_NB + 0.01 * torch.randn(num_tokens, num_blocks)
        assert_balanced(balanced_assignment(scores_NB), scores_NB)
