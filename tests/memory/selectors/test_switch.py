import pytest
import torch

from fairseq_sffn.memory import SelectorInput
from fairseq_sffn.memory.selectors.switch import Switch
from tests.memory.cases import build, close, tokens


def test_scores_are_those_of_the_router():
    memory, (x, _) = build("switch-top2"), tokens(8)
    selection = memory(x).selection
    close(selection.scores.logits, x @ memory.selector.router.t())
    probs = (x @ memory.selector.router.t()).softmax(dim=1)
    top = probs.topk(2)
    assert torch.equal(selection.blocks, top.indices)
    close(selection.weights, top.values)
    assert selection.scores.logits.shape == (8, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gate_is_fp32_in_narrower_models(dtype):
    memory, (x, _) = build("switch-top1", dtype), tokens(64, dtype=dtype)
    selector = memory.selector
    scores = selector(SelectorInput(x)).scores.logits
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, x.float() @ selector.router.float().t())


def test_the_gate_is_fp32_under_autocast():
    selector, (x, _) = build("switch-top1", torch.float32).selector, tokens(64, dtype=torch.float32)
    exact = selector(SelectorInput(x)).scores.logits
    with torch.autocast("cpu", torch.bfloat16):
        scores = selector(SelectorInput(x)).scores.logits
    assert scores.dtype == torch.float32
    assert torch.equal(scores, exact)


def test_defaults():
    assert Switch.default_gate == "softmax"
    assert Switch.default_balance_weight == 0.01
    assert Switch.default_block_size(512) == 512


def test_the_router_learns_from_the_output():
    memory, (x, _) = build("switch-top1"), tokens(8)
    (grad,) = torch.autograd.grad(memory(x).output.square().sum(), memory.selector.router)
    assert (grad != 0).any(dim=1).all()  # the softmax reaches blocks that no token chose


def test_a_router_of_mean_keys_is_avgk():
    """A Switch router with the mean keys selects as Avg-K does without a router."""
    switch = build("switch-top1", gate="none")
    avgk = build("switch-top1", selector="avgk")
    with torch.no_grad():
        switch.key_bias.zero_()
        switch.selector.router.copy_(switch.keys.view(4, 8, 8).mean(dim=1))
    avgk.load_state_dict({k: v for k, v in switch.state_dict().items() if "router" not in k})
    x = tokens(40)[0].requires_grad_()
    ours, theirs = switch(x), avgk(x)
    assert torch.equal(ours.selection.blocks, theirs.selection.blocks)
    close(ours.output, theirs.output)
    close(ours.balance_loss, theirs.balance_loss)
    cotangent = torch.randn_like(x)
    grads = [
        torch.autograd.grad(out.output, (x, m.keys, m.key_bias, m.values, m.value_bias), cotangent)
        for out, m in ((ours, switch), (theirs, avgk))
    ]
    for got, wanted in zip(*grads, strict=True):
        close(got, wanted)
