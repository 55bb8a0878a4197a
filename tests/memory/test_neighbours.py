"""A token's output does not depend on its neighbours or on padding."""

import pytest
import torch

from tests.memory.cases import CASES, UNSCORED, build, close, tokens


@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_neighbours_do_not_matter_in_evaluation(case, capacity_factor):
    memory = build(case, capacity_factor=capacity_factor).eval()
    x, token_ids = tokens(20)
    whole = memory(x, token_ids).output
    permutation = torch.randperm(20)
    close(memory(x[permutation], token_ids[permutation]).output, whole[permutation])
    close(memory(x[3:9], token_ids[3:9]).output, whole[3:9])
    close(memory(x[5], token_ids[5]).output, whole[5])
    crowd = memory(x[5].expand(50, 8), token_ids[5].expand(50, 2)).output
    close(crowd, whole[5].expand(50, 8))
    padded = memory(x, token_ids, padding_mask=torch.rand(20) < 0.5).output
    close(padded, whole)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_later_tokens_change_nothing_earlier(case, training):
    if training and case == "base":
        pytest.skip("balances all tokens of the batch against each other")
    memory = build(case, capacity_factor=0.0).train(training)
    (x, token_ids), (other_x, other_ids) = tokens(3, 10), tokens(3, 10)
    other_x, other_ids = 100 * other_x, other_ids.clone()
    other_x[:, :6], other_ids[:, :6] = x[:, :6], token_ids[:, :6]
    torch.manual_seed(1)
    before = memory(x, token_ids).output
    torch.manual_seed(1)
    after = memory(other_x, other_ids).output
    close(after[:, :6], before[:, :6], tolerance=1e-12)
    assert not torch.allclose(after[:, 6:], before[:, 6:])


@pytest.mark.parametrize("scale", [10, 1e6])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_stands_at_padding_changes_nothing_else(case, training, scale):
    memory = build(case, capacity_factor=1.0).train(training)
    padding_mask = torch.tensor([[0, 0, 0, 1, 1], [1, 0, 0, 0, 1]], dtype=torch.bool)
    (x, token_ids), (other_x, other_ids) = tokens(2, 5), tokens(2, 5)
    other_x = torch.where(padding_mask.unsqueeze(-1), scale * other_x, x)
    other_ids = torch.where(padding_mask.unsqueeze(-1), other_ids, token_ids)

    def call(x, token_ids, padding_mask=None):
        torch.manual_seed(1)
        return memory(x, token_ids, padding_mask=padding_mask)

    a = call(x, token_ids, padding_mask)
    others = [call(other_x, other_ids, padding_mask)]
    if not (training and case == "gshard-sampled"):  # fewer tokens give other draws
        others.append(call(x[~padding_mask], token_ids[~padding_mask]))  # no padding at all
    for other in others:
        output = other.output[~padding_mask] if other is others[0] else other.output
        close(output, a.output[~padding_mask], "output", 1e-12)
        assert torch.equal(other.usage.counts, a.usage.counts)
        assert other.usage.dropped == a.usage.dropped
        close(other.usage.importance, a.usage.importance, "importance", 1e-6)
        if a.balance_loss is not None:
            close(other.balance_loss, a.balance_loss, "balance_loss", 1e-12)
            close(other.z_loss, a.z_loss, "z_loss", 1e-12)
    if not (training and case == "gshard-sampled"):
        assert a.usage.counts.sum() == 6 * memory.config.routed.active_blocks


@pytest.mark.parametrize("case", [case for case in CASES if case not in UNSCORED])
def test_padding_gets_no_gradient_from_the_losses(case):
    memory, (x, token_ids) = build(case), tokens(6)
    padding_mask = torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool)
    out = memory(x.requires_grad_(), token_ids, padding_mask=padding_mask)
    (grad,) = torch.autograd.grad(out.balance_loss + out.z_loss, x)
    assert (grad[padding_mask] == 0).all()
    assert (grad[~padding_mask] != 0).any(dim=1).all()
