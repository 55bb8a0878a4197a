"""Scores of product keys against the sums that they represent."""

import pytest
import torch

from fairseq_sffn.memory import top_blocks as top_blocks_module
from fairseq_sffn.memory.balance import balance_loss, z_loss
from fairseq_sffn.memory.gate import GATES
from fairseq_sffn.memory.product_scores import ProductScores, candidate_ranks
from fairseq_sffn.memory.scores import Scores, normalized, sqrt_softplus
from fairseq_sffn.memory.top_blocks import top_blocks
from tests.memory.cases import build, tokens
from tests.memory.oracle import assert_matches

DOUBLE = torch.float64
SIZES = [(1, 1, 1), (1, 7, 3), (7, 1, 7), (2, 3, 6), (3, 4, 5), (4, 9, 20), (16, 16, 16), (5, 8, 1)]


def product_scores(num_tokens, heads, left, right, dtype=DOUBLE):
    scores = ProductScores(
        torch.randn(num_tokens, heads, left).to(dtype).requires_grad_(),
        torch.randn(num_tokens, heads, right).to(dtype).requires_grad_(),
    )
    return scores, summed(scores)


def summed(scores):
    """Return one dense score for each head."""
    sums_NHLR = scores.left.unsqueeze(3) + scores.right.unsqueeze(2)
    return [Scores(logits_NB) for logits_NB in sums_NHLR.flatten(2).unbind(1)]


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def assert_same(actual, expected, scores):
    """Check that values and the gradients of the halves are equal."""
    close(actual, expected)
    cotangent, halves = torch.randn_like(expected), (scores.left, scores.right)
    for got, wanted in zip(
        torch.autograd.grad(actual, halves, cotangent, retain_graph=True),  # the graphs share parts
        torch.autograd.grad(expected, halves, cotangent, retain_graph=True),
        strict=True,
    ):
        close(got, wanted)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("left", "right", "each"), SIZES)
def test_top_is_that_of_all_sums(left, right, each, heads):
    scores, dense = product_scores(6, heads, left, right)
    expected = torch.stack([head.top(each) for head in dense], dim=2).flatten(1)  # best first
    top = scores.top(heads * each)
    assert top.dtype == torch.int64
    assert torch.equal(top, expected)


@pytest.mark.parametrize("seed", range(60))
def test_top_of_any_size(seed):
    torch.manual_seed(seed)
    left, right = torch.randint(1, 12, (2,)).tolist()
    each = int(torch.randint(1, left * right + 1, (1,)))
    scores, (dense,) = product_scores(4, 1, left, right)
    assert torch.equal(scores.top(each), dense.top(each))


@pytest.mark.parametrize(("left", "right", "each"), SIZES)
def test_top_where_many_are_equal(left, right, each):
    scores = ProductScores(
        torch.randint(2, (20, 2, left)).double(), torch.randint(3, (20, 2, right)).double()
    )
    blocks_NA = scores.top(2 * each)
    sums_NA = scores.of(blocks_NA)
    for h, dense in enumerate(summed(scores)):
        assert torch.equal(sums_NA[:, h::2], dense.logits.topk(each).values)
        assert all(len(set(row)) == each for row in blocks_NA[:, h::2].tolist())


@pytest.mark.parametrize(
    ("left", "right", "count"), [(1, 1, 1), (4, 7, 3), (5, 2, 100), (20, 30, 30), (64, 64, 64)]
)
def test_candidates_are_the_pairs_that_few_others_beat(left, right, count):
    ranks = candidate_ranks(left, right, count, torch.device("cpu"))
    pairs = [(i, j) for i in range(left) for j in range(right) if (i + 1) * (j + 1) <= count]
    assert torch.stack(ranks, dim=1).tolist() == [list(pair) for pair in pairs]


@pytest.mark.parametrize(("left", "right", "each"), [(3, 4, 5), (1, 7, 3)])
def test_one_head_is_a_dense_score(left, right, each):
    def two_sequences(values):
        return values.unflatten(0, (3, 2)).transpose(0, 1)

    scores, (dense,) = product_scores(6, 1, left, right)
    blocks_NA = scores.top(each)
    valid_N = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    counts_B = torch.randint(5, (left * right,))
    assert_same(scores.of(blocks_NA), dense.of(blocks_NA), scores)
    assert_same(scores.log_probs(blocks_NA), dense.log_probs(blocks_NA), scores)
    assert_same(scores.log_partition(), dense.log_partition(), scores)
    assert_same(scores.mass(blocks_NA), dense.mass(blocks_NA), scores)
    assert_same(scores.entropy(), dense.entropy(), scores)
    for valid in (None, valid_N):
        close(scores.moments(valid), dense.moments(valid))
    for gate in filter(None, GATES.values()):
        assert_same(gate.weights(scores, blocks_NA), gate.weights(dense, blocks_NA), scores)
    for valid in (None, valid_N, torch.zeros_like(valid_N)):
        assert_same(scores.mean_shares(valid), dense.mean_shares(valid), scores)
        assert_same(
            scores.mean_shares(valid, split=two_sequences),
            dense.mean_shares(valid, split=two_sequences),
            scores,
        )
        assert_same(
            balance_loss(scores, counts_B, valid), balance_loss(dense, counts_B, valid), scores
        )
        assert_same(z_loss(scores, valid), z_loss(dense, valid), scores)


@pytest.mark.parametrize("valid", [None, [1, 0, 1, 1, 0, 1]])
def test_heads_score_by_themselves_and_are_averaged(valid):
    valid_N = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    scores, dense = product_scores(6, 3, 2, 4)
    blocks_NA = scores.top(9)
    of_heads = list(zip(dense, blocks_NA.unflatten(1, (3, 3)).unbind(dim=2), strict=True))
    counts_B = torch.randint(5, (8,))

    assert_same(
        scores.of(blocks_NA), torch.stack([d.of(b) for d, b in of_heads], 2).flatten(1), scores
    )
    log_probs_NA = torch.stack([d.log_probs(b) for d, b in of_heads], dim=2).flatten(1)
    assert_same(scores.log_probs(blocks_NA), log_probs_NA, scores)
    assert_same(scores.log_partition(), torch.cat([d.log_partition() for d in dense], 1), scores)

    def mean(values):
        return torch.stack(values).mean(dim=0)

    assert_same(
        scores.mean_shares(valid_N)[0], mean([d.mean_shares(valid_N)[0] for d in dense]), scores
    )
    assert_same(
        balance_loss(scores, counts_B, valid_N),
        mean([balance_loss(d, counts_B, valid_N) for d in dense]),
        scores,
    )
    assert_same(z_loss(scores, valid_N), mean([z_loss(d, valid_N) for d in dense]), scores)
    assert_same(scores.mass(blocks_NA), mean([d.mass(b) for d, b in of_heads]), scores)
    assert_same(scores.entropy(), mean([d.entropy() for d in dense]), scores)
    close(scores.moments(valid_N), mean([d.moments(valid_N) for d in dense]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_probabilities_are_at_least_fp32(dtype):
    scores, (dense,) = product_scores(50, 1, 4, 8, dtype)
    mean_B = scores.mean_shares(None)[0]
    assert mean_B.dtype == scores.log_partition().dtype == torch.float32
    torch.testing.assert_close(mean_B, dense.mean_shares(None)[0], rtol=0.01, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scores.mean_shares(None)[0], mean_B)


def test_huge_scores_stay_finite():
    scores, _ = product_scores(6, 2, 3, 4)
    scores = ProductScores(1e4 * scores.left, 1e4 * scores.right)
    assert scores.mean_shares(None)[0].isfinite().all()
    assert float(scores.mean_shares(None)[0].sum()) == pytest.approx(1.0)
    assert scores.log_probs(scores.top(4)).exp().isfinite().all()


@pytest.mark.parametrize("heads", [1, 2])
def test_no_tokens(heads):
    scores, _ = product_scores(0, heads, 3, 4)
    assert scores.top(4 * heads).shape == (0, 4 * heads)
    assert scores.log_probs(scores.top(2)).shape == (0, 2)
    assert (scores.mean_shares(None)[0] == torch.zeros(12)).all()
    assert z_loss(scores, None) == 0


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_dense_log_partition(scale):
    logits_NB = (scale * torch.randn(20, 6, dtype=DOUBLE)).requires_grad_()
    actual, expected = Scores(logits_NB).log_partition(), logits_NB.logsumexp(1, keepdim=True)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-12)
    cotangent = torch.randn_like(expected)
    grads = [torch.autograd.grad(t, logits_NB, cotangent)[0] for t in (actual, expected)]
    close(*grads)


@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0], [1e4, -1e4, 1e4], [-1e30, -1e30, -1e30]])
def test_dense_log_partition_of_ties_and_extremes(logits):
    logits_NB = torch.tensor([logits], requires_grad=True)
    log_partition = Scores(logits_NB).log_partition()
    torch.testing.assert_close(log_partition, logits_NB.logsumexp(1, keepdim=True))
    (grad,) = torch.autograd.grad(log_partition, logits_NB)
    torch.testing.assert_close(grad, logits_NB.detach().softmax(dim=1))


def test_losses_do_not_depend_on_what_was_read_before():
    logits_NB = torch.randn(9, 5, dtype=DOUBLE, requires_grad=True)
    with torch.no_grad():
        wanted = Scores(logits_NB).mean_shares(None)[0]
    scores = Scores(logits_NB)
    blocks_NA = scores.top(2)
    scores.log_probs(blocks_NA)
    mean_B = scores.mean_shares(None)[0]
    close(mean_B.detach(), wanted)
    assert mean_B.requires_grad
    assert torch.autograd.grad(mean_B[0], logits_NB)[0].any()


def test_gradients_of_score_functions():
    logits_NB = torch.linspace(-60, 60, 24, dtype=DOUBLE).view(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(sqrt_softplus, logits_NB)
    scores_NB = torch.rand(4, 6, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(normalized, scores_NB)
    close(normalized(scores_NB), scores_NB / scores_NB.sum(1, keepdim=True))
    assert (normalized(0 * scores_NB) == 0).all()


def test_ruled_out_blocks_have_no_root_and_no_gradient():
    logits = torch.tensor([-torch.inf, -110.0, 1.0], requires_grad=True)
    roots = sqrt_softplus(logits)
    (grad,) = torch.autograd.grad(roots.sum(), logits)
    assert roots[0] == grad[0] == 0
    # They are far below the default tolerance.
    torch.testing.assert_close(grad[1], roots[1].detach() / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(roots[1], torch.tensor(-55.0).exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrt_softplus"])
def test_shares_are_computed_once(function):
    scores = Scores(torch.randn(4, 6, requires_grad=True))
    assert scores.shares(function) is scores.shares(function)
    torch.testing.assert_close(scores.shares(function).sum(dim=1), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("blocks", "active"), [(128, 2), (300, 299), (500, 500), (1024, 64)])
def test_partial_sorts_find_what_topk_finds(blocks, active, dtype, monkeypatch):
    for name in ("PARTITIONED_SCORES", "PARTITIONED_ACTIVE"):
        monkeypatch.setattr(top_blocks_module, name, 1)
    scores_NB = torch.stack([torch.randperm(blocks) for _ in range(7)]).to(dtype) - blocks / 2
    scores_NB[1, 3], scores_NB[2, 5] = torch.inf, -torch.inf
    scores_NB[3] = 0.0  # all equal
    scores_NB.requires_grad_()
    top = top_blocks(scores_NB, active)
    assert top.dtype == torch.int64 and top.shape == (7, active)
    assert all(len(set(row)) == active for row in top.tolist())
    assert torch.equal(scores_NB.gather(1, top), scores_NB.topk(active).values)  # best first


def test_partial_sorts_take_what_is_no_number_for_the_best(monkeypatch):
    for name in ("PARTITIONED_SCORES", "PARTITIONED_ACTIVE"):
        monkeypatch.setattr(top_blocks_module, name, 1)
    scores_NB = torch.randn(3, 200)
    scores_NB[1, 77] = torch.nan
    assert top_blocks(scores_NB, 2)[1, 0] == scores_NB.topk(2).indices[1, 0] == 77


@pytest.mark.parametrize("losses", [True, False])
@pytest.mark.parametrize("case", ["avgk-g4", "vanilla_m-g1", "vanilla_m-max", "lorkm-g1", "gshard"])
def test_partial_sorts_select_as_the_loops_do(case, losses, monkeypatch):
    for name in ("PARTITIONED_BLOCKS", "PARTITIONED_SCORES", "PARTITIONED_ACTIVE"):
        monkeypatch.setattr(top_blocks_module, name, 1)
    assert_matches(build(case), *tokens(8), losses=losses)
