"""Passes of one model do not disturb each other, and leave nothing in its modules."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fairseq_sffn.memory import MemoryOutput, SparseMemory
from tests.memory.cases import close
from tests.models.small_lm import PAD, evaluated, random_tokens, small_lm


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_an_exception_leaves_nothing_behind(checkpoint_activations):
    model = evaluated("switch", checkpoint_activations=checkpoint_activations)
    batch = random_tokens(2, 4)
    expected = model(batch)[0]

    memory = [m for m in model.modules() if isinstance(m, SparseMemory)][1]
    working = memory.selector
    memory.selector = nn.Module()  # it has no forward
    with pytest.raises(NotImplementedError):
        model(batch)
    memory.selector = working
    close(model(batch)[0], expected)


class Watched(SparseMemory):
    """A memory that counts hooks while it runs."""

    model: nn.Module
    found: ClassVar[list[int]] = []

    def forward(self, *args: Any, **kwargs: Any) -> MemoryOutput:
        self.found.append(hooks(self.model))
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_no_hook_is_registered(checkpoint_activations, monkeypatch):
    monkeypatch.setattr(Watched, "found", [])
    model = small_lm("switch", checkpoint_activations=checkpoint_activations)
    memory = model.decoder.layers[1].fc1.memory
    memory.__class__ = Watched
    vars(memory)["model"] = model
    model(random_tokens(2, 4), routing_losses=True)[0].sum().backward()
    assert memory.found == [0] * (1 + checkpoint_activations)


def interleaved(model: nn.Module, batches: list[Tensor], **options: Any) -> list[Any]:
    """Run a pass of each batch in a separate thread. Every pass is inside the memory of every layer
    before any pass leaves it."""
    meeting = threading.Barrier(len(batches), timeout=10)

    def wait(*_: Any) -> None:
        meeting.wait()

    memories = [m for m in model.modules() if isinstance(m, SparseMemory)]
    handles = [m.register_forward_pre_hook(wait) for m in memories]
    handles += [m.register_forward_hook(wait) for m in memories]
    with ThreadPoolExecutor(len(batches)) as pool:
        results = list(pool.map(lambda batch: model(batch, **options), batches))
    for handle in handles:
        handle.remove()
    return results


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("method", ["avgk", "switch", "hash_layer"])
def test_interleaved_passes_do_not_mix(method, checkpoint_activations):
    options = dict(sffn_freq=1, checkpoint_activations=checkpoint_activations)
    model = small_lm(method, **options)
    batches = [random_tokens(2, 8), random_tokens(3, 5), random_tokens(4, 1)]
    batches[0][1, -3:] = PAD
    alone = [model(batch, routing_losses=True) for batch in batches]
    together = interleaved(model, batches, routing_losses=True)
    for (output, extra), (expected, expected_extra) in zip(together, alone, strict=True):
        assert torch.equal(output, expected)
        for name, layer in expected_extra["routing"].items():
            assert all(map(torch.equal, extra["routing"][name], layer))
    gradients = []
    for outputs in (together, alone):
        model.zero_grad()
        objective = 0.0
        for output, extra in reversed(outputs):
            losses = sum(layer.balance_loss + layer.z_loss for layer in extra["routing"].values())
            objective = objective + output.square().sum() + losses
        objective.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)


def test_one_pass_wants_losses_and_another_does_not():
    model = small_lm("switch", sffn_freq=1)
    batch = random_tokens(2, 8)
    plain = model(batch)[1]["routing"]
    wanted = model(batch, routing_losses=True)[1]["routing"]
    assert all(layer.balance_loss == layer.z_loss == 0 for layer in plain.values())
    assert all(layer.balance_loss > 0 and layer.z_loss > 0 for layer in wanted.values())


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_gradients_of_passes_before_one_backward_add_up(checkpoint_activations):
    """With --update-freq, a pass of other tokens comes between a pass and its backward."""
    model = small_lm("switch", sffn_freq=1, checkpoint_activations=checkpoint_activations)
    batches = [random_tokens(2, 8), random_tokens(3, 5)]

    def objective(batch: Tensor) -> Tensor:
        output, extra = model(batch, routing_losses=True)
        losses = sum(layer.balance_loss + layer.z_loss for layer in extra["routing"].values())
        return output.square().sum() + losses

    for batch in batches:
        objective(batch).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for loss in [objective(batch) for batch in batches]:
        loss.backward()
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        close(ours.grad, theirs)


@pytest.mark.parametrize("method", ["avgk", "vanilla_m"])
def test_checkpointed_layers_select_alike_under_autocast(method):
    """fairseq recomputes without autocast, which could change the block in near-ties."""
    model = small_lm(method, torch.float32, checkpoint_activations=True)
    chosen = []
    memory = model.decoder.layers[1].fc1.memory
    memory.register_forward_hook(lambda module, args, out: chosen.append(out.selection.blocks))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(random_tokens(40, 16))[0]
    output.float().square().sum().backward()
    first, again = chosen
    assert torch.equal(first, again)
