import pytest
import torch

from fairseq_sffn.memory import SelectorInput
from fairseq_sffn.memory.selectors.gshard import GShard
from tests.memory.cases import build, close, tokens

SAMPLED = GShard.Config(second_expert="sampled")


@pytest.fixture
def top2gating(monkeypatch):
    """Return fairscale's gate on logits, without the noise that samples its second expert."""
    top2gate = pytest.importorskip("fairscale.nn.moe.top2gate")
    monkeypatch.setattr(
        top2gate, "gumbel_rsample", lambda shape, device: torch.zeros(shape, device=device)
    )
    return top2gate.top2gating


def as_matrix(selection, values_NA, num_blocks):
    """Return (N, B), the values at the selected blocks."""
    empty_NB = values_NA.new_zeros(len(values_NA), num_blocks)
    return empty_NB.scatter(1, selection.blocks, values_NA)


@pytest.mark.parametrize("num_tokens", [4, 16, 64])
@pytest.mark.parametrize("num_blocks", [2, 4, 8])
def test_fairscale_weighs_tokens_alike(num_blocks, num_tokens, top2gating):
    memory = build("gshard", num_cells=4 * num_blocks, capacity_factor=1.0)
    x, _ = tokens(num_blocks * num_tokens // 2)
    if len(x) % num_blocks:
        x = x[: len(x) // num_blocks * num_blocks]
    out = memory(x)
    logits_NB = x @ memory.selector.router.t()
    l_aux, combine_NBc, dispatch_NBc = top2gating(logits_NB)
    kept_NB = as_matrix(out.selection, out.selection.kept.double(), num_blocks)
    # The same assignments fit.
    assert torch.equal(dispatch_NBc.any(dim=2), kept_NB.bool())
    assert out.usage.dropped == 2 * len(x) - dispatch_NBc.sum()
    # If both assignments of a token fit, they weigh the same. If one does not fit, fairscale gives
    # the other one all the weight.
    weights_NB = as_matrix(out.selection, out.selection.weights, num_blocks)
    whole_N = out.selection.kept.all(dim=1)
    assert whole_N.any()
    close(combine_NBc.sum(dim=2)[whole_N], weights_NB[whole_N], tolerance=1e-6)
    alone_N = out.selection.kept.sum(dim=1) == 1
    theirs_N = combine_NBc.sum(dim=(1, 2))[alone_N]
    close(theirs_N, torch.ones_like(theirs_N), tolerance=1e-6)
    assert ((weights_NB * kept_NB).sum(dim=1)[alone_N] < 1).all()
    # Its loss is the mean over blocks, times the squared number of blocks. Ours is a sum over
    # blocks.
    close(out.balance_loss, num_blocks**2 * l_aux, tolerance=1e-5)


def test_fairscale_drops_the_same_tokens_where_many_are_dropped(top2gating):
    memory = build("gshard", capacity_factor=1.0)
    x = tokens(32)[0] + 2 * memory.selector.router[1]  # most tokens prefer block 1
    out = memory(x)
    _, _, dispatch_NBc = top2gating(x @ memory.selector.router.t())
    assert out.usage.dropped > 8
    kept_NB = as_matrix(out.selection, out.selection.kept.double(), 4)
    assert torch.equal(dispatch_NBc.any(dim=2), kept_NB.bool())


def test_the_gradient_of_the_loss_is_that_of_fairscale(top2gating):
    memory, (x, _) = build("gshard"), tokens(16)
    l_aux, _, _ = top2gating(x @ memory.selector.router.t())
    (wanted,) = torch.autograd.grad(16 * l_aux, memory.selector.router)
    (grad,) = torch.autograd.grad(memory(x).balance_loss, memory.selector.router)
    close(grad, wanted, tolerance=1e-6)


@pytest.mark.parametrize("case", ["gshard", "gshard-top3", "gshard-sampled"])
def test_the_balance_loss_counts_first_choices_only(case):
    memory, (x, _) = build(case), tokens(50)
    out = memory(x)
    probs_NB = (x @ memory.selector.router.t()).softmax(dim=1)
    shares_B = torch.bincount(out.selection.blocks[:, 0], minlength=4) / 50
    close(out.balance_loss, 4 * (probs_NB.mean(dim=0) * shares_B).sum(), tolerance=1e-6)


# The sampled second expert


def logits_for(second_weight):
    """Return scores whose second choice has this weight among the two."""
    return torch.tensor([0.0, -torch.inf, torch.logit(torch.tensor(second_weight)), -torch.inf])


@pytest.mark.parametrize("second_weight", [0.01, 0.1, 0.25, 0.4, 0.49, 0.5])
def test_the_second_is_kept_with_twice_its_weight(second_weight):
    selector = build("gshard-sampled", embed_dim=4).selector
    with torch.no_grad():
        selector.router.copy_(torch.eye(4))
    num_tokens = 20_000
    x = logits_for(second_weight).clamp(min=-100).expand(num_tokens, 4)
    selection = selector(SelectorInput(x.double()))
    assert selection.blocks.unique(dim=0).tolist() == [[0, 2]]
    assert selection.kept[:, 0].all()
    chance = min(1.0, 2 * second_weight)
    deviation = (chance * (1 - chance) / num_tokens) ** 0.5
    assert abs(selection.kept[:, 1].double().mean() - chance) <= 4 * deviation


def test_other_draws_at_each_pass_and_for_each_token():
    memory, (x, _) = build("gshard-sampled"), tokens(1)
    kept = [memory(x.expand(200, 8)).selection.kept for _ in range(2)]
    assert not torch.equal(*kept)
    assert 0 < kept[0][:, 1].sum() < 200


def test_both_are_kept_in_evaluation():
    memory, (x, _) = build("gshard-sampled").eval(), tokens(50)
    every = build("gshard").eval()
    every.load_state_dict(memory.state_dict())
    out = memory(x)
    assert out.selection.kept is None
    assert out.usage.counts.sum() == 100
    close(out.output, every(x).output, tolerance=0)


def test_what_is_left_out_is_not_used_and_takes_no_room():
    memory, (x, _) = build("gshard-sampled"), tokens(60)
    padding_mask = torch.arange(60) % 5 == 0
    out = memory(x, padding_mask=padding_mask)
    kept_NA, weights_NA = out.selection.kept, out.selection.weights
    counted_NA = kept_NA & ~padding_mask.unsqueeze(1)
    assert 48 < counted_NA.sum() < 96
    wanted = torch.bincount(out.selection.blocks[counted_NA], minlength=4)
    assert torch.equal(out.usage.counts, wanted)
    assert out.usage.dropped == 0
    close(out.usage.importance.sum().double(), (weights_NA * counted_NA).sum(), tolerance=1e-4)

    # Second blocks that are left out leave their room to other tokens.
    limited = build("gshard-sampled", capacity_factor=1.0)
    limited.load_state_dict(memory.state_dict())
    out = limited(x)
    assert out.usage.counts.sum() < 120
    used_B = torch.bincount(out.selection.blocks[out.selection.kept], minlength=4)
    capacity = -(-int(out.usage.counts.sum()) // 4)
    assert torch.equal(used_B, out.usage.counts.clamp(max=capacity))
    assert out.usage.dropped == out.usage.counts.sum() - used_B.sum()


def test_the_first_keeps_its_weight_where_the_second_is_left_out():
    memory, (x, _) = build("gshard-sampled"), tokens(60)
    out = memory(x)
    close(out.selection.weights.sum(dim=1), torch.ones(60).double())
    alone_N = ~out.selection.kept[:, 1]
    assert alone_N.any()
    hidden_NG = torch.einsum("nd,ngd->ng", x, memory.keys.view(4, 4, 8)[out.selection.blocks[:, 0]])
    hidden_NG = (hidden_NG + memory.key_bias.view(4, 4)[out.selection.blocks[:, 0]]).relu()
    rows_ND = torch.einsum(
        "ng,ngd->nd", hidden_NG, memory.values.view(4, 4, 8)[out.selection.blocks[:, 0]]
    )
    wanted_ND = out.selection.weights[:, :1] * rows_ND + memory.value_bias
    close(out.output[alone_N], wanted_ND[alone_N])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_first_is_always_kept(dtype):
    memory = build("gshard-sampled", dtype)
    with torch.no_grad():
        memory.selector.router[1:] = memory.selector.router[:1]  # ties: weights of one half
    selection = memory(torch.randn(5000, 8, dtype=dtype)).selection
    assert selection.kept.all()


def test_defaults():
    assert (GShard.default_gate, GShard.default_balance_weight) == ("renormalized", 0.01)
    assert [GShard.default_block_size(width) for width in (512, 3, 1)] == [256, 1, 1]
    assert GShard.Config().second_expert == "all"
