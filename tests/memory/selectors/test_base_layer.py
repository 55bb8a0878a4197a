import pytest
import torch

from fairseq_sffn.memory.selectors.base_layer import BASELayer
from fairseq_sffn.memory.selectors.switch import Switch
from tests.memory.cases import build, close, tokens
from tests.memory.oracle_methods import assert_balanced


def scores_of(memory, x):
    return (x.reshape(-1, 8) @ memory.selector.router.t()).detach()


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 30, 64])
def test_training_loads_blocks_alike(num_tokens):
    memory, (x, _) = build("base"), tokens(num_tokens)
    out = memory(x)
    assert_balanced(out.selection.blocks.squeeze(1), scores_of(memory, x))
    assert out.usage.counts.max() - out.usage.counts.min() <= 1


def test_training_loads_blocks_alike_when_all_tokens_want_one():
    memory = build("base")
    x = tokens(40)[0] * 0.1 + 5 * memory.selector.router[2].detach()
    assert memory(x).usage.counts.tolist() == [10] * 4
    assert memory.eval()(x).usage.counts.tolist() == [0, 0, 40, 0]


def test_padding_is_left_out_of_the_balance():
    memory, (x, _) = build("base"), tokens(6, 10)
    padding_mask = torch.rand(6, 10) < 0.5
    out = memory(x, padding_mask=padding_mask)
    valid_N, scores_NB = ~padding_mask.flatten(), scores_of(memory, x)
    blocks_N = out.selection.blocks.squeeze(1)
    assert_balanced(blocks_N[valid_N], scores_NB[valid_N])
    assert torch.equal(blocks_N[~valid_N], scores_NB[~valid_N].argmax(dim=1))
    assert out.usage.counts.max() - out.usage.counts.min() <= 1
    assert out.usage.counts.sum() == valid_N.sum()


def test_evaluation_takes_the_best_block():
    memory, (x, _) = build("base").eval(), tokens(40)
    assert torch.equal(memory(x).selection.blocks.squeeze(1), scores_of(memory, x).argmax(dim=1))


def test_evaluation_is_switch_with_a_logistic_gate():
    memory = build("base").eval()
    switch = build("base", selector="switch", gate="sigmoid").eval()
    switch.load_state_dict(memory.state_dict())
    x, _ = tokens(40)
    ours, theirs = memory(x), switch(x)
    close(ours.output, theirs.output, tolerance=0)
    close(ours.balance_loss, theirs.balance_loss, tolerance=0)


def test_the_weight_is_the_logistic_function_of_the_score():
    memory, (x, _) = build("base"), tokens(40)
    selection = memory(x).selection
    close(selection.weights, scores_of(memory, x).gather(1, selection.blocks).sigmoid())
    (grad,) = torch.autograd.grad(memory(x).output.sum(), memory.selector.router)
    assert grad.any(dim=1).all()


def test_the_assignment_is_the_same_each_time():
    memory, (x, _) = build("base"), tokens(40)
    first, second = (memory(x).selection.blocks for _ in range(2))
    assert torch.equal(first, second)


def test_a_capacity_of_the_fair_share_drops_nothing_in_training():
    memory = build("base", capacity_factor=1.0)
    for num_tokens in (1, 6, 30):
        assert memory(tokens(num_tokens)[0]).usage.dropped == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_training_goes_on_to_report_what_is_not_finite(value):
    memory, (x, _) = build("base", torch.float32), tokens(30, dtype=torch.float32)
    x[4] = value
    out = memory(x)
    assert out.usage.counts.sum() == 30
    assert out.usage.counts.max() - out.usage.counts.min() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype):
    memory, (x, _) = build("base", dtype), tokens(30, dtype=dtype)
    out = memory(x)
    assert out.output.dtype == dtype
    assert_balanced(out.selection.blocks.squeeze(1), out.selection.scores.logits.detach())


def test_defaults():
    assert (BASELayer.default_gate, BASELayer.default_balance_weight) == ("sigmoid", 0.0)
    assert BASELayer.default_block_size(512) == Switch.default_block_size(512) == 512
