"""A whole memory compiles into one graph."""

import pytest
import torch

from tests.memory.cases import build, close, tokens

pytestmark = pytest.mark.slow


def assert_compiles(memory):
    """Check that the compiled memory returns the same values and gradients."""
    x, token_ids = tokens(6)
    inputs = [x.requires_grad_(), *memory.parameters()]
    torch._dynamo.reset()
    outcomes = []
    for call in (memory, torch.compile(memory, fullgraph=True, backend="eager")):
        torch.manual_seed(1)
        out = call(x, token_ids)
        total = out.output.square().sum()
        if out.balance_loss is not None:
            total = total + out.balance_loss + out.z_loss
        grads = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        outcomes.append((out.output, out.usage.counts.double(), *grads))
    for got, want in zip(outcomes[1], outcomes[0], strict=True):
        close(got, want, tolerance=1e-9)


ONE_OF_EACH = ("avgk-g4", "vanilla_m-max", "lorkm-g1", "pkm", "pkm-activation", "pkm_ffn")
ONE_OF_EACH += ("moe", "sigma_moe", "hash_moe", "aoe")
ONE_OF_EACH += ("rand_hash", "hash_layer", "hash_layer-bigram", "switch-top1", "gshard-sampled")


@pytest.mark.parametrize(
    ("case", "training"),
    [*((case, True) for case in ONE_OF_EACH), ("base", False), ("avgk-g4", False)],
)
def test_a_memory_compiles_into_one_graph(case, training):
    """``base`` in training is an exception, as the host assigns the tokens."""
    assert_compiles(build(case).train(training))


@pytest.mark.parametrize("engine", ["tiled", "masked"])
def test_engines_that_compile(engine):
    assert_compiles(build("switch-top2", engine=engine, gate="softmax", capacity_factor=1.0))
