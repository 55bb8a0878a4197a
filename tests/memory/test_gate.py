import math

import pytest
import torch

from fairseq_sffn.memory.gate import GATES
from fairseq_sffn.memory.scores import Scores

SCORES = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
BLOCKS = torch.tensor([[3, 0], [2, 1]])


def test_values():
    total, top, second = sum(math.exp(s) for s in (1, -2, 0.5, 3)), math.exp(3), math.exp(1)
    expected = {
        "softmax": [[top / total, second / total], [0.25, 0.25]],
        "renormalized": [[top / (top + second), second / (top + second)], [0.5, 0.5]],
        "sigmoid": [[top / (1 + top), second / (1 + second)], [0.5, 0.5]],
    }
    assert GATES.keys() == {"none", *expected}
    assert GATES["none"] is None
    for name, weights in expected.items():
        got = GATES[name](Scores(SCORES), BLOCKS)
        torch.testing.assert_close(got, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize("gate", ["softmax", "renormalized", "sigmoid"])
def test_gradcheck(gate):
    scores = SCORES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: GATES[gate](Scores(s), BLOCKS), scores)


@pytest.mark.parametrize("gate", ["softmax", "renormalized", "sigmoid"])
def test_large_scores_stay_finite(gate):
    weights = GATES[gate](Scores(1e4 * SCORES.float()), BLOCKS)
    assert weights.isfinite().all()
    assert ((weights >= 0) & (weights <= 1)).all()


def test_renormalized_ignores_the_other_blocks():
    other = SCORES.clone()
    other[:, 0], other[0, 0] = 50.0, SCORES[0, 0]  # row 0 selects block 0, row 1 does not
    assert torch.equal(
        GATES["renormalized"](Scores(other), BLOCKS), GATES["renormalized"](Scores(SCORES), BLOCKS)
    )
    assert not torch.equal(
        GATES["softmax"](Scores(other), BLOCKS), GATES["softmax"](Scores(SCORES), BLOCKS)
    )


@pytest.mark.parametrize("gate", ["softmax", "renormalized", "sigmoid"])
@pytest.mark.parametrize("shape", [(0, 2), (3, 1)])
def test_few(gate, shape):
    num_tokens, active = shape
    blocks = torch.zeros(num_tokens, active, dtype=torch.int64)
    assert GATES[gate](Scores(torch.zeros(num_tokens, 1)), blocks).shape == shape
