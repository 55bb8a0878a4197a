import math

import pytest
import torch

from fairseq_sffn.memory import ProductScores, Scores, gate
from fairseq_sffn.memory.gate import GATES, Gate
from fairseq_sffn.memory.scores import sqrt_softplus
from tests.memory.cases import build, close, tokens
from tests.memory.oracle import assert_matches

SCORES = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
BLOCKS = torch.tensor([[3, 0], [2, 1]])
NAMES = [name for name in GATES if name != "none"]


def weights(name, scores, blocks=BLOCKS):
    return GATES[name].weights(scores if isinstance(scores, Scores) else Scores(scores), blocks)


def test_values():
    total, top, second = sum(math.exp(s) for s in (1, -2, 0.5, 3)), math.exp(3), math.exp(1)
    roots = [math.sqrt(math.log(1 + e)) for e in (top, second)]
    sigmoids = [e / (1 + e) for e in (top, second)]
    expected = {
        "softmax": [[top / total, second / total], [0.25, 0.25]],
        "renormalized": [[top / (top + second), second / (top + second)], [0.5, 0.5]],
        "sigmoid": [sigmoids, [0.5, 0.5]],
        "sigmoid_renormalized": [[s / sum(sigmoids) for s in sigmoids], [0.5, 0.5]],
        "sqrt_softplus": [roots, [math.sqrt(math.log(2))] * 2],
        "sqrt_softplus_renormalized": [[r / sum(roots) for r in roots], [0.5, 0.5]],
    }
    assert GATES.keys() == {"none", *expected}
    assert GATES["none"] is None
    for name, wanted in expected.items():
        close(weights(name, SCORES), torch.tensor(wanted, dtype=torch.float64), name, 1e-14)


def test_a_gate_is_a_score_function_and_a_normalisation():
    assert GATES["renormalized"] == Gate(score="softmax", renormalized=True)
    functions = {name: gate.score_function(name) for name in GATES}
    assert functions == {
        "none": "logits",
        "softmax": "softmax",
        "renormalized": "softmax",
        "sigmoid": "sigmoid",
        "sigmoid_renormalized": "sigmoid",
        "sqrt_softplus": "sqrt_softplus",
        "sqrt_softplus_renormalized": "sqrt_softplus",
    }
    renormalized = {name for name in NAMES if GATES[name].renormalized}
    assert renormalized == {name for name in NAMES if "renormalized" in name}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_learns_if_its_weights_can_differ(name):
    """One renormalised weight is always 1."""
    one, two = (gate.learns(name, active_blocks) for active_blocks in (1, 2))
    assert (one, two) == (name in ("softmax", "sigmoid", "sqrt_softplus"), name != "none")
    if name == "none":
        return
    for active_blocks, wanted in ((1, one), (2, two)):
        scores = SCORES.clone().requires_grad_()
        weight_N = weights(name, scores, BLOCKS[:, :active_blocks])[:, 0]
        (grad,) = torch.autograd.grad(weight_N.sum(), scores)
        assert bool((grad.abs() > 1e-15).any()) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    scores = SCORES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: weights(name, s), scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [30.0, 1e2, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_large_scores_stay_finite(name, sign, scale, dtype):
    scores = (sign * scale * SCORES).to(dtype).requires_grad_()
    weights_NA = weights(name, scores)
    assert weights_NA.isfinite().all() and (weights_NA >= 0).all()
    if name != "sqrt_softplus":  # the only one that is not bounded
        assert (weights_NA <= 1).all()
    (grad,) = torch.autograd.grad(weights_NA[:, 0].sum(), scores)
    assert grad.isfinite().all()


@pytest.mark.parametrize("logit", [-300.0, -100.0, -41.0, -39.0, -1.0, 0.0, 19.0, 21.0, 39.0, 41.0])
def test_sqrt_softplus_at_every_size(logit):
    scores = torch.tensor([[logit]], dtype=torch.float64, requires_grad=True)
    root = weights("sqrt_softplus", scores, torch.tensor([[0]]))
    wanted = math.sqrt(math.log1p(math.exp(logit)))
    assert float(root) == pytest.approx(wanted, rel=1e-14)
    (grad,) = torch.autograd.grad(root, scores)
    assert float(grad) == pytest.approx(1 / (1 + math.exp(-logit)) / (2 * wanted), rel=1e-13)


@pytest.mark.parametrize("name", [name for name in NAMES if GATES[name].renormalized])
def test_renormalized_ignores_the_other_blocks(name):
    other = SCORES.clone()
    other[:, 0], other[0, 0] = 50.0, SCORES[0, 0]  # row 0 selects block 0, row 1 does not
    assert torch.equal(weights(name, other), weights(name, SCORES))
    assert not torch.equal(weights("softmax", other), weights("softmax", SCORES))
    close(weights(name, SCORES).sum(dim=1), torch.ones(2).double(), tolerance=1e-15)


@pytest.mark.parametrize("name", [name for name in NAMES if GATES[name].renormalized])
def test_renormalized_sums_over_the_blocks_of_all_heads(name):
    """A block that two heads selected counts twice."""
    left, right = torch.randn(5, 2, 3).double(), torch.randn(5, 2, 4).double()
    scores = ProductScores(left, right)
    blocks_NA = scores.top(6)
    blocks_NA[0, 1] = blocks_NA[0, 0]
    close(weights(name, scores, blocks_NA).sum(dim=1), torch.ones(5).double(), tolerance=1e-15)
    raw = {"softmax": torch.exp, "sigmoid": torch.sigmoid, "sqrt_softplus": sqrt_softplus}
    for n, blocks in enumerate(blocks_NA.tolist()):
        logits = [left[n, a % 2, i // 4] + right[n, a % 2, i % 4] for a, i in enumerate(blocks)]
        values = raw[gate.score_function(name)](torch.stack(logits))
        close(weights(name, scores, blocks_NA)[n], values / values.sum(), tolerance=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 2), (3, 1)])
def test_few(name, shape):
    num_tokens, active = shape
    blocks = torch.zeros(num_tokens, active, dtype=torch.int64)
    assert weights(name, torch.zeros(num_tokens, 1), blocks).shape == shape


@pytest.mark.parametrize("case", ["avgk-g4", "vanilla_m-max", "lorkm-g4", "pkm", "switch-top2"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_fp32_in_half_precision(name, case):
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        memory, (x, _) = build(case, dtype, gate=name), tokens(6, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            selection = memory(x).selection
        assert selection.weights.dtype == torch.float32
        logits = selection.scores.of(selection.blocks).float()
        if GATES[name].score == "sigmoid" and not GATES[name].renormalized:
            close(selection.weights, logits.sigmoid(), tolerance=1e-7)


# The route scale


@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
@pytest.mark.parametrize("case", ["avgk-g4", "pkm", "pkm_ffn", "switch-top2", "gshard-sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_the_route_scale_multiplies_the_weights(name, case, capacity_factor):
    options = dict(gate=name, capacity_factor=capacity_factor)
    memory, (x, token_ids) = build(case, route_scale=2.5, **options), tokens(7)
    assert_matches(memory, x, token_ids)
    plain = build(case, **options)
    plain.load_state_dict(memory.state_dict())
    torch.manual_seed(1)
    scaled = memory(x, token_ids)
    torch.manual_seed(1)
    unscaled = plain(x, token_ids)
    close(scaled.selection.weights, 2.5 * unscaled.selection.weights)
    bias = memory.value_bias
    close(scaled.output - bias, 2.5 * (unscaled.output - bias))
    close(scaled.balance_loss, unscaled.balance_loss, tolerance=0)
