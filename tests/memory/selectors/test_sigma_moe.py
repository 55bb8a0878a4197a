import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fairseq_sffn.memory import SelectorInput
from fairseq_sffn.memory.selectors.sigma_moe import SigmaMoE
from tests.memory.cases import build, close, tokens

EVERY = SigmaMoE.Config(expert_dropout=0.0)


def test_defaults():
    assert (SigmaMoE.default_gate, SigmaMoE.default_block_size(512)) == ("sigmoid", 128)
    assert (SigmaMoE.default_balance_weight, SigmaMoE.balance_loss_kind) == (1e-3, "entropy")
    assert SigmaMoE.Config().expert_dropout == 0.05


def test_one_block_weighed_by_softmax_is_switch():
    sizes = dict(num_cells=32, block_size=8, active_blocks=1)
    switch = build("switch-top1", **sizes)
    memory = build("sigma_moe", selector=EVERY, gate="softmax", **sizes)
    memory.load_state_dict(switch.state_dict())
    x, _ = tokens(20)
    cotangent, grads = torch.randn_like(x), []
    for module in (memory, switch):
        out = module(x_ := x.clone().requires_grad_())
        names, tensors = zip(("x", x_), *module.named_parameters(), strict=True)
        found = torch.autograd.grad((out.output * cotangent).sum() + out.z_loss, tensors)
        grads.append({"output": out.output, **dict(zip(names, found, strict=True))})
    for name, grad in grads[0].items():
        close(grad, grads[1][name], name, 1e-12)


def test_the_balance_loss_is_minus_the_entropy_of_the_mean():
    memory, (x, _) = build("sigma_moe"), tokens(50)
    probs_B = (x @ memory.selector.router.t()).softmax(dim=1).mean(dim=0)
    close(memory(x).balance_loss, (probs_B * probs_B.log()).sum())


# Expert dropout


@pytest.fixture
def left_out(monkeypatch):
    """Return a function that makes a selector leave out the blocks of given draws."""

    def draw(draws):
        monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.tensor(draws))

    return draw


def test_a_block_that_is_left_out_is_left_out_for_all_tokens(left_out):
    memory, (x, _) = build("sigma_moe"), tokens(200)
    left_out([0.9, 0.1, 0.5, 0.29, 0.31, 0.9, 0.9, 0.2])
    out = memory(x)
    logits_NB = x @ memory.selector.router.t()
    close(out.selection.scores.logits, logits_NB)  # gate and losses read all scores
    assert (out.usage.counts == 0).nonzero().flatten().tolist() == [1, 3, 7]
    left = torch.tensor([0, 2, 4, 5, 6])
    assert torch.equal(out.selection.blocks, left[logits_NB[:, left].topk(3).indices])
    close(out.selection.weights, logits_NB.sigmoid().gather(1, out.selection.blocks))


def test_as_many_blocks_are_left_as_a_token_uses(left_out):
    memory, (x, _) = build("sigma_moe"), tokens(50)
    left_out([0.01, 0.2, 0.02, 0.03, 0.21, 0.04, 0.29, 0.05])
    blocks_NA = memory(x).selection.blocks
    assert (blocks_NA.sort().values == torch.tensor([1, 4, 6])).all()


def test_the_probability():
    selector = build("sigma_moe", num_cells=300, block_size=1, active_blocks=1).selector
    inputs = SelectorInput(tokens(1)[0])
    left_out_DB = torch.stack([selector.draw_left_out(inputs) for _ in range(200)])
    assert abs(left_out_DB.double().mean() - 0.3) < 4 * (0.3 * 0.7 / left_out_DB.numel()) ** 0.5
    assert left_out_DB.any(dim=0).all() and not left_out_DB.all(dim=0).any()


def test_every_pass_draws_again_and_evaluation_does_not():
    memory, (x, _) = build("sigma_moe", num_cells=96), tokens(100)
    blocks = [memory(x).selection.blocks for _ in range(2)]
    assert not torch.equal(*blocks)
    logits_NB = x @ memory.selector.router.t()
    assert torch.equal(memory.eval()(x).selection.blocks, logits_NB.topk(3).indices)
    every = build("sigma_moe", num_cells=96, selector=EVERY)
    every.load_state_dict(memory.state_dict())
    assert torch.equal(every(x).selection.blocks, logits_NB.topk(3).indices)


def test_without_dropout_no_number_is_drawn():
    memory, (x, _) = build("sigma_moe", selector=EVERY), tokens(5)
    before = torch.get_rng_state()
    memory(x)
    build("sigma_moe").eval()(x)
    torch.manual_seed(0)
    torch.set_rng_state(before)


@pytest.mark.parametrize("number_of_tokens", [1, 7, 50])
def test_the_draw_does_not_depend_on_the_number_of_tokens(number_of_tokens):
    selector = build("sigma_moe").selector
    torch.manual_seed(1)
    wanted = selector.draw_left_out(SelectorInput(tokens(3)[0]))
    inputs = SelectorInput(tokens(number_of_tokens)[0])
    torch.manual_seed(1)
    selector.draw_left_out(inputs)
    torch.manual_seed(1)
    tokens(3)
    assert torch.equal(selector.draw_left_out(inputs), wanted)


def test_the_ranks_leave_out_what_the_first_rank_draws():
    selector, first = build("sigma_moe").selector, torch.tensor([0.1, 0.9] * 4)
    inputs = SelectorInput(tokens(3)[0])
    inputs = inputs._replace(stack_over_tokens=lambda own: torch.stack([first, own, own]))
    assert selector.draw_left_out(inputs).tolist() == [True, False] * 4


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_second_pass_of_checkpointing_leaves_out_the_same_blocks(use_reentrant):
    """Otherwise gradients would be of other blocks."""
    memory, (x, _) = build("sigma_moe"), tokens(20)
    grads, seen = [], []
    memory.selector.register_forward_hook(lambda *args: seen.append(args[2].blocks))

    def run(x):
        out = memory(x)
        return out.output, out.balance_loss

    for call in (run, lambda x: checkpoint(run, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        memory.zero_grad()
        output, balance_loss = call(x_ := x.clone().requires_grad_())
        torch.rand(5)  # other layers draw between the two passes
        (output.square().sum() + balance_loss).backward()
        grads.append({"x": x_.grad, **{n: p.grad for n, p in memory.named_parameters()}})
    assert len(seen) == 3 and all(torch.equal(seen[0], blocks) for blocks in seen)
    for name, grad in grads[0].items():
        close(grad, grads[1][name], name, 0)
