"""Balance without a loss: biases that follow the load of an update."""

import copy

import pytest
import torch

from fairseq_sffn.memory import ConfigError
from fairseq_sffn.memory.gate import score_function
from fairseq_sffn.memory.selectors.sigma_moe import SigmaMoE
from tests.memory.cases import CASE_GATES, SELECTORS, UNSCORED, build, close, tokens

FUNCTIONS = {
    "logits": lambda row: row,
    "softmax": lambda row: [torch.exp(s) / sum(torch.exp(t) for t in row) for s in row],
    "sigmoid": lambda row: [1 / (1 + torch.exp(-s)) for s in row],
    "sqrt_softplus": lambda row: [torch.log(1 + torch.exp(s)) ** 0.5 for s in row],
}
"""Score function -> function of the logits of one head of a token."""
OTHERS = [*UNSCORED, "hash_moe", "base"]
SCORED = [(case, gate) for case, gate in CASE_GATES if case not in OTHERS]


@pytest.fixture(autouse=True)
def no_expert_dropout(monkeypatch):
    monkeypatch.setattr(SigmaMoE, "draw_left_out", lambda self, _: torch.zeros(1, dtype=torch.bool))


RATE = 0.3


def balanced(case="avgk-g4", **changes):
    memory = build(case, **{"balance_rate": RATE, **changes})
    memory.balancer.bias.copy_(0.3 * torch.randn(len(memory.balancer.bias)))
    return memory


def logits_of(scores):
    """Return (N, H, B) logits, from scores of one head or of product keys."""
    if hasattr(scores, "left"):
        return (scores.left.unsqueeze(3) + scores.right.unsqueeze(2)).flatten(2).detach()
    return scores.logits.unsqueeze(1).detach()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("case", "gate"), SCORED)
def test_biases_are_added_to_the_scores_for_selection(case, gate, training):
    memory, (x, ids) = balanced(case, gate=gate).train(training), tokens(9)
    free = copy.deepcopy(memory)
    free.balancer.bias.zero_()
    function = FUNCTIONS[score_function(gate)]
    for losses in (True, False):
        selection = memory(x, ids, losses=losses).selection
        logits_NHB = logits_of(memory(x, ids).selection.scores)
        heads, active = logits_NHB.shape[1], memory.config.routed.active_blocks
        for n in range(9):
            for h in range(heads):
                row = function(list(logits_NHB[n, h]))
                biased = torch.stack(row) + memory.balancer.bias
                wanted = biased.topk(active // heads).indices.tolist()
                assert selection.blocks[n, h::heads].tolist() == wanted
    if active < len(memory.balancer.bias):
        assert not torch.equal(selection.blocks, free(x, ids).selection.blocks)
    close(logits_of(free(x, ids).selection.scores), logits_NHB)


@pytest.mark.parametrize(("case", "gate"), SCORED)
def test_gates_and_losses_read_scores_without_biases(case, gate):
    """A constant bias changes no selection, and hence nothing at all."""
    memory, (x, ids) = build(case, gate=gate, balance_rate=RATE), tokens(9)
    torch.manual_seed(1)  # GShard may draw second choices
    before = memory(x, ids)
    memory.balancer.bias.fill_(100)
    torch.manual_seed(1)
    after = memory(x, ids)
    close(after.output, before.output)
    close(after.balance_loss, before.balance_loss)
    close(after.z_loss, before.z_loss)
    close(after.usage.routed_mass, before.usage.routed_mass)


@pytest.mark.parametrize(("padding", "micro_batches"), [(False, 1), (True, 4)])
@pytest.mark.parametrize(("case", "gate"), SCORED)
def test_biases_follow_the_load_of_an_update(case, gate, padding, micro_batches):
    """One step for all micro-batches, by the sign of the load's distance from the mean."""
    memory, (x, ids) = balanced(case, gate=gate), tokens(20)
    mask = torch.arange(20) % 3 == 0 if padding else torch.zeros(20, dtype=torch.bool)
    wanted = memory.balancer.bias.double().tolist()
    whole = memory.eval()(x, ids)  # no step, and no load
    memory.train()
    real = [n for n in range(20) if not mask[n]]
    blocks = whole.selection.blocks
    counts = [int((blocks[real] == i).sum()) for i in range(len(wanted))]
    deviation = 1.0
    if gate == "none":
        values = logits_of(whole.selection.scores)[real].flatten().tolist()
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    for i, count in enumerate(counts):
        mean = sum(counts) / len(counts)
        wanted[i] += RATE * deviation * ((count < mean) - (count > mean))
    for part in torch.arange(20).chunk(micro_batches):
        memory(x[part], ids[part], padding_mask=mask[part])
    if "sampled" in case:  # GShard's second choices are drawn anew
        return
    memory.end_update()
    close(memory.balancer.bias.double(), torch.tensor(wanted).double(), tolerance=1e-5)
    moved = memory.balancer.bias.clone()
    memory.end_update()  # nothing since
    assert torch.equal(memory.balancer.bias, moved)


def test_what_does_not_count():
    memory, (x, _) = balanced(), tokens(20)
    before = memory.balancer.bias.clone()
    with torch.no_grad():  # the first pass of activation checkpointing
        memory(x)
    memory(x, padding_mask=torch.ones(20, dtype=torch.bool))
    memory(x[:0])
    memory.eval()
    memory(x)
    memory.train().end_update()
    assert torch.equal(memory.balancer.bias, before)
    memory(x)
    memory.begin_update()  # the update of that micro-batch was not made
    memory.end_update()
    assert torch.equal(memory.balancer.bias, before)
    memory(x)
    memory.end_update()
    assert not torch.equal(memory.balancer.bias, before)


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_overflows_leaves_finite_biases(value, gate):
    memory, (x, _) = balanced(gate=gate), tokens(20)
    before = memory.balancer.bias.clone()
    x[7, 3] = value
    memory(x)
    memory.end_update()
    assert memory.balancer.bias.isfinite().all()
    assert gate == "sigmoid" or torch.equal(memory.balancer.bias, before)


@pytest.mark.parametrize("gate", ["none", "softmax", "sigmoid"])
def test_biases_even_out_the_load(gate):
    rate = {"none": 0.02, "softmax": 0.002, "sigmoid": 0.01}[gate]
    memory, (x, _) = build(balance_rate=rate, gate=gate), tokens(400)
    x = x + 2 * torch.randn(8)  # a part that all tokens share
    first = memory(x).usage.counts
    for _ in range(300):
        last = memory(x).usage.counts
        memory.end_update()
    assert first.max() > 1.5 * 200 and last.max() < 1.1 * 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_steps_in_half_precision(dtype):
    memory = build(balance_rate=1e-4, dtype=torch.float32)
    memory.balancer.bias.fill_(8 + 1e-5)
    memory.to(dtype)
    assert (memory.balancer.bias == torch.tensor(8 + 1e-5)).all()
    memory(tokens(50)[0].to(dtype))
    memory.end_update()
    assert (memory.balancer.bias != torch.tensor(8 + 1e-5)).any()
    assert memory.double().balancer.bias.dtype == torch.float64


def test_a_checkpoint_has_the_biases_alone():
    memory, other = balanced(), build(balance_rate=RATE)
    memory(tokens(20)[0])
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.balancer.bias, memory.balancer.bias)
    names = memory.state_dict().keys()
    assert {name for name in names if "balancer" in name} == {"balancer.bias"}
    assert not any("balancer" in name for name in build().state_dict())


def test_the_range_of_the_biases():
    memory, (x, _) = balanced(), tokens(5)
    bias = memory.balancer.bias.tolist()
    assert float(memory(x).usage.bias_range) == pytest.approx(max(bias) - min(bias))
    assert build()(x).usage.bias_range == 0


@pytest.mark.parametrize("rate", [-0.1, float("inf"), float("nan")])
def test_rates_that_are_none(rate):
    with pytest.raises(ConfigError, match="balance_rate"):
        build(balance_rate=rate)


@pytest.mark.parametrize("case", OTHERS)
def test_methods_without_a_choice_to_bias(case):
    with pytest.raises(ConfigError, match=rf"balance_rate 0\.1: {SELECTORS[case].name}"):
        build(case, balance_rate=0.1)


def test_what_expert_dropout_leaves_out_stays_out(monkeypatch):
    """A large bias does not bring back a block that is left out for a micro-batch."""
    out_B = torch.arange(8) == 2
    monkeypatch.setattr(SigmaMoE, "draw_left_out", lambda self, _: out_B)
    memory, (x, _) = build("sigma_moe", balance_rate=RATE), tokens(9)
    memory.balancer.bias[2] = 100
    assert (memory(x).selection.blocks != 2).all()
    assert (memory.eval()(x).selection.blocks[:, 0] == 2).all()
