import math

import pytest
import torch

from fairseq_sffn.memory.balance import assignment_counts, balance_loss, entropy_loss, z_loss
from fairseq_sffn.memory.scores import Scores
from tests.memory.cases import CASE_GATES, UNSCORED, build, close, tokens
from tests.memory.oracle import assert_matches

DOUBLE = torch.float64


def test_counts():
    blocks_NA = torch.tensor([[0, 2], [2, 3], [2, 0]])
    assert assignment_counts(blocks_NA, 5, None).tolist() == [2, 0, 3, 1, 0]
    valid_N = torch.tensor([True, False, True])
    assert assignment_counts(blocks_NA, 5, valid_N.unsqueeze(1)).tolist() == [2, 0, 2, 0, 0]
    assert assignment_counts(blocks_NA, 5, None).dtype == torch.int64
    assert assignment_counts(blocks_NA[:0], 2, None).tolist() == [0, 0]


@pytest.mark.parametrize("num_blocks", [1, 2, 4, 32])
@pytest.mark.parametrize("active", [1, 2])
def test_one_at_perfect_balance(num_blocks, active):
    # Token n prefers block n, then n + 1, so every block has the same share and probability.
    active = min(active, num_blocks)
    scores_NB = 3 * torch.eye(num_blocks, dtype=DOUBLE)
    scores_NB += torch.eye(num_blocks, dtype=DOUBLE).roll(1, dims=1)
    blocks_NA = scores_NB.topk(active).indices
    counts_B = assignment_counts(blocks_NA, num_blocks, None)
    assert len(set(counts_B.tolist())) == 1
    assert balance_loss(Scores(scores_NB), counts_B, None) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("num_blocks", [2, 4, 32])
def test_number_of_blocks_when_one_takes_everything(num_blocks):
    scores_NB = torch.zeros(10, num_blocks, dtype=DOUBLE)
    scores_NB[:, 1] = 100.0
    counts_B = assignment_counts(scores_NB.topk(1).indices, num_blocks, None)
    assert balance_loss(Scores(scores_NB), counts_B, None) == pytest.approx(num_blocks, abs=1e-12)


def test_gradient_flows_through_the_probabilities_only():
    scores_NB = torch.randn(8, 4, dtype=DOUBLE, requires_grad=True)
    counts_B = torch.tensor([4, 2, 1, 1])
    (grad,) = torch.autograd.grad(balance_loss(Scores(scores_NB), counts_B, None), scores_NB)
    # d loss / d s_nj = B / N * p_nj * (share_j - sum_i p_ni share_i)
    probs = scores_NB.softmax(dim=1)
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=DOUBLE)
    expected = 4 / 8 * probs * (shares - (probs * shares).sum(dim=1, keepdim=True))
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-14)


def test_z_loss_value():
    scores_NB = torch.tensor([[0.0, 0.0], [3.0, 3.0]], dtype=DOUBLE)
    log2 = torch.tensor(2.0, dtype=DOUBLE).log()
    assert z_loss(Scores(scores_NB), None) == pytest.approx(float(log2**2 + (3 + log2) ** 2) / 2)


@pytest.mark.parametrize(
    "loss", [lambda s, v: balance_loss(s, torch.tensor([3, 1]), v), z_loss, entropy_loss]
)
def test_padding_does_not_count(loss):
    scores_NB = torch.randn(6, 2, dtype=DOUBLE)
    valid_N = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    wanted = loss(Scores(scores_NB[valid_N]), None)
    assert loss(Scores(scores_NB), valid_N) == pytest.approx(float(wanted), abs=1e-12)
    scores_NB[~valid_N] = 1e6
    assert loss(Scores(scores_NB), valid_N) == pytest.approx(float(wanted), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_at_least_fp32_inside(dtype):
    scores_NB = torch.randn(8, 4).to(dtype)
    counts_B = torch.tensor([4, 2, 1, 1])
    scores = Scores(scores_NB)
    for loss in (
        balance_loss(scores, counts_B, None),
        z_loss(scores, None),
        entropy_loss(scores, None),
    ):
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
    # 300 squared overflows fp16.
    assert z_loss(Scores((scores_NB + 300).to(dtype)), None).isfinite()


@pytest.mark.parametrize("valid", [None, [1, 1, 1, 1, 1, 1, 0]])
def test_fp64_keeps_its_precision(valid):
    scores_NB = torch.randn(7, 3, dtype=DOUBLE)
    valid_N = torch.ones(7, dtype=torch.bool) if valid is None else torch.tensor(valid).bool()
    counts_B = torch.tensor([3, 2, 2]) if valid is None else torch.tensor([3, 2, 1])
    mean_B = scores_NB[valid_N].softmax(dim=1).mean(dim=0)
    wanted = 3 * (mean_B * counts_B.double() / counts_B.sum()).sum()
    got = balance_loss(Scores(scores_NB), counts_B, None if valid is None else valid_N)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


# Scopes of the loss

SCORED = [(case, gate) for case, gate in CASE_GATES if case not in UNSCORED]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("sequence_dim", [0, 1, -2, -3])
@pytest.mark.parametrize(
    ("case", "gate"), [("avgk-g4", "sigmoid"), ("pkm", "none"), ("gshard", None)]
)
def test_loss_of_each_sequence(case, gate, sequence_dim, padding):
    x, ids = tokens(3, 4)
    mask = torch.rand(3, 4) < 0.4 if padding else None
    if padding:
        mask[1] = True  # with dimension 1, a sequence of padding alone
    assert_matches(build(case, gate=gate), x, ids, mask, sequence_dim=sequence_dim)


@pytest.mark.parametrize(("case", "gate"), SCORED)
def test_one_sequence_is_the_micro_batch(case, gate):
    memory, (x, ids) = build(case, gate=gate), tokens(9)
    grads = []
    for scope in ("micro", "sequence"):
        torch.manual_seed(1)
        loss = memory(x, ids, balance_scope=scope).balance_loss
        memory.zero_grad()
        loss.backward()
        # AoE's loss reads the low-rank products alone, so the rest has no gradient.
        gradients = {n: p.grad for n, p in memory.named_parameters() if p.grad is not None}
        grads.append({"loss": loss.detach(), **gradients})
    micro, sequence = grads
    assert micro.keys() == sequence.keys() and len(micro) > 1
    for name, wanted in micro.items():
        close(sequence[name], wanted, name)


@pytest.mark.parametrize("case", ["avgk-g4", "gshard", "pkm", "switch-top2"])
def test_global_loads_are_those_of_the_update_so_far(case):
    memory, batches = build(case), [tokens(9) for _ in range(3)]
    choices = 1 if case == "gshard" else memory.config.active_blocks
    loads = torch.zeros(memory.config.num_blocks, dtype=torch.int64)
    for _ in range(2):
        for x, ids in batches:
            with torch.no_grad():  # the first pass of activation checkpointing
                first = memory(x, ids, balance_scope="global").balance_loss
            out = memory(x, ids, balance_scope="global")
            loads += out.selection.blocks[:, :choices].flatten().bincount(minlength=len(loads))
            wanted = balance_loss(out.selection.scores, loads, None)
            close(out.balance_loss, wanted)
            close(first, wanted)
            memory.eval()
            close(
                memory(x, ids, balance_scope="global").balance_loss,
                memory(x, ids).balance_loss,
            )
            memory.train()
        memory.end_update()
        loads.zero_()
    x, ids = batches[0]
    close(memory(x, ids, balance_scope="global").balance_loss, memory(x, ids).balance_loss)


# Entropy


def test_entropy_loss_value():
    """It is the entropy of the mean, not the mean of the entropies."""
    scores_NB = torch.tensor([[9.0, 0.0, 1.0], [0.0, 9.0, 1.0]], dtype=DOUBLE)
    probs_B = scores_NB.softmax(dim=1).mean(dim=0)
    wanted = sum(p * math.log(p) for p in probs_B.tolist())
    assert entropy_loss(Scores(scores_NB), None) == pytest.approx(wanted, abs=1e-14)
    assert wanted < -0.69


@pytest.mark.parametrize("num_blocks", [1, 2, 32])
def test_entropy_loss_is_between_log_b_and_0(num_blocks):
    even_NB = torch.zeros(5, num_blocks, dtype=DOUBLE)
    one_NB = even_NB.clone()
    one_NB[:, 0] = 1e4
    even, one = (float(entropy_loss(Scores(s), None)) for s in (even_NB, one_NB))
    assert even == pytest.approx(-math.log(num_blocks), abs=1e-14) and one == 0


@pytest.mark.parametrize("valid", [None, [1, 0, 1, 1]])
def test_entropy_loss_gradcheck(valid):
    valid_N = None if valid is None else torch.tensor(valid).bool()
    scores_NB = torch.randn(4, 3, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: entropy_loss(Scores(s), valid_N), scores_NB)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_entropy_loss_has_a_gradient_without_tokens_and_with_impossible_blocks(dtype):
    scores_NB = torch.tensor([[0.0, 1e4, 3.0]] * 2, dtype=dtype, requires_grad=True)
    for valid in (None, [False, False]):
        valid_N = None if valid is None else torch.tensor(valid)
        loss = entropy_loss(Scores(scores_NB), valid_N)
        (grad,) = torch.autograd.grad(loss, scores_NB)
        assert loss == 0 and grad.isfinite().all()
