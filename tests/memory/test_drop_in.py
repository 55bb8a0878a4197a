"""A memory in models whose code stays as it is."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairseq_sffn.memory import ConfigError
from fairseq_sffn.memory.drop_in import (
    MemoryFFN,
    begin_update,
    end_update,
    feed_tokens,
    memories,
)
from tests.memory.cases import VOCAB_SIZE, build, close


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.way = mlp, ""

    def forward(self, x: Tensor) -> Tensor:
        if not self.way:
            return x + self.mlp(x)
        return x + checkpoint(self.mlp, x, use_reentrant=self.way == "reentrant")


class Model(nn.Module):
    """Calls its MLPs with hidden states alone, as models of transformers do."""

    def __init__(self, case: str = "switch-top2", weight=0.5, layers: int = 2, **changes) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, 8, dtype=torch.float64)
        self.blocks = nn.ModuleList(
            Block(MemoryFFN(build(case, **changes), weight)) for _ in range(layers)
        )

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None) -> Tensor:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.blocks:
            x = block(x)
        return x


def ids(*shape: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, shape)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("way", ["", "reentrant", "not reentrant"])
def test_the_losses_of_all_layers_join_the_gradients(way):
    model, tokens = Model(), ids(3, 5)
    for block in model.blocks:
        block.mlp.z_weight = 0.25
    x, expected = model.embed(tokens), torch.zeros((), dtype=torch.float64)
    for block in model.blocks:
        out = block.mlp.memory(x)
        expected = expected + 0.5 * out.balance_loss + 0.25 * out.z_loss
        x = x + out.output
    wanted = gradients(model, x.square().mean() + expected)
    for block in model.blocks:
        block.way = way
    y = model(tokens)
    close(y, x, tolerance=1e-12)  # and the losses are not in the values
    for name, grad in gradients(model, y.square().mean()).items():
        close(grad, wanted[name], name, 1e-12)


def test_without_a_weight_or_in_evaluation_no_loss_joins():
    model, tokens = Model(weight=0.0), ids(3, 5)
    other = copy.deepcopy(model)
    for block in other.blocks:
        block.mlp.balance_weight = 0.5
    plain = gradients(model, model(tokens).square().mean())
    weighted = gradients(other, other(tokens).square().mean())
    assert any(not torch.allclose(plain[name], weighted[name]) for name in plain)
    evaluated = gradients(other.eval(), other(tokens).square().mean())
    for name, grad in evaluated.items():
        close(grad, plain[name], name, 1e-12)
    with torch.no_grad():
        close(other.train()(tokens), model(tokens), tolerance=1e-12)


def test_the_default_weight_is_the_selectors():
    assert MemoryFFN(build("switch-top1")).balance_weight == 0.01
    assert MemoryFFN(build("moe")).balance_weight == 0.0


@pytest.mark.parametrize(
    ("case", "weights", "message"),
    [
        ("hash_layer", dict(balance_weight=0.1), "^balance_weight 0.1: hash_layer selects by no"),
        ("hash_moe", dict(balance_weight=0.1), "^balance_weight 0.1: hash_moe selects by no"),
        ("rand_hash", dict(z_weight=0.1), "^z_weight 0.1: rand_hash selects by no"),
        ("moe", dict(balance_weight=-1.0), "^balance_weight -1.0: must not be negative"),
    ],
)
def test_weights_that_cannot_act_are_refused(case, weights, message):
    with pytest.raises(ConfigError, match=message):
        MemoryFFN(build(case), **weights)


def test_under_autocast_the_loss_joins_too():
    memory = build("switch-top2", torch.float32)
    ffn, x = MemoryFFN(memory, 3.0), torch.randn(20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = ffn(x)
    assert output.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad((0 * output).sum(), memory.selector.router)
    (wanted,) = torch.autograd.grad(3 * memory(x).balance_loss, memory.selector.router)
    close(grad, wanted, tolerance=1e-6)


# Token ids and padding


@pytest.mark.parametrize("case", ["hash_layer", "hash_moe", "rand_hash"])
@pytest.mark.parametrize("way", ["", "reentrant", "not reentrant"])
def test_ids_reach_hash_methods(case, way):
    model, tokens = Model(case, None), ids(3, 5)
    feed_tokens(model)
    for block in model.blocks:
        block.way = way
    x = model.embed(tokens)
    for block in model.blocks:
        x = x + block.mlp.memory(x, tokens).output
    wanted = gradients(model, x.square().mean())
    for y in (model(tokens), model(input_ids=tokens)):
        close(y, x, tolerance=1e-12)
        for name, grad in gradients(model, y.square().mean()).items():
            close(grad, wanted[name], name, 1e-12)


def test_padding_does_not_count():
    model, tokens = Model(balance_rate=0.1), ids(2, 5)
    feed_tokens(model)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    model(tokens, mask)
    assert [int(memory.balancer.loads.sum()) for memory in memories(model)] == [2 * 7] * 2
    begin_update(model)
    model(tokens, mask.bool()[:, None, None])  # a mask of attention weights is no padding mask
    model(tokens)
    assert [int(memory.balancer.loads.sum()) for memory in memories(model)] == [2 * 20] * 2


def test_the_mask_of_a_whole_sequence_fits_its_last_positions():
    model = Model("rand_hash", None)
    feed_tokens(model)
    counts = []
    for memory in memories(model):
        memory.register_forward_hook(lambda *call: counts.append(int(call[2].usage.counts.sum())))
    model(ids(2, 1), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    assert counts == [3, 3]


def test_ids_of_an_earlier_call_are_forgotten():
    model = Model("hash_layer", None)
    feed_tokens(model)
    model(ids(2, 3))
    with pytest.raises(ValueError, match="hash_layer selects by token ids: give them"):
        model(inputs_embeds=torch.randn(2, 3, 8, dtype=torch.float64))


def test_models_that_cannot_be_fed_are_refused():
    with pytest.raises(ValueError, match=r"^the model has no MemoryFFN$"):
        feed_tokens(nn.Linear(1, 1))
    with pytest.raises(
        ValueError, match=r"^words is no argument of the model's forward: input_ids"
    ):
        feed_tokens(Model(), ids="words")
    with pytest.raises(ConfigError, match=r"^selector hash_layer: reads 2 token ids"):
        feed_tokens(Model("hash_layer-bigram", None))


def test_without_the_hook_nothing_is_fed():
    model = Model("hash_layer", None)
    feed_tokens(model).remove()
    with pytest.raises(ValueError, match="give them"):
        model(ids(2, 3))


# Biases, copies and files


def test_an_optimizer_moves_the_biases():
    model, tokens = Model(balance_rate=0.1), ids(4, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: end_update(model))
    model(tokens).square().mean().backward()
    loads = [memory.balancer.loads.clone() for memory in memories(model)]
    optimizer.step()
    assert len(loads) == 2
    for memory, loads_B in zip(memories(model), loads, strict=True):
        wanted_B = 0.1 * (loads_B.double().mean() - loads_B).sign()
        assert wanted_B.any()
        close(memory.balancer.bias, wanted_B, tolerance=1e-6)
        assert not memory.balancer.loads.any()


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def stored(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = Model("hash_moe", None)
    feed_tokens(loaded)
    loaded.load_state_dict(torch.load(file))
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, stored])
def test_copies_compute_the_same_by_themselves(copied):
    model, tokens = Model("hash_moe", None), ids(3, 5)
    feed_tokens(model)
    wanted = model(tokens)
    other = copied(model)
    assert torch.equal(other(tokens), wanted)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()
    more = ids(3, 5)
    model.embed.weight.data.zero_()  # and the hook of the copy feeds the copy
    assert not torch.equal(other(more), model(more))
    assert torch.equal(other.blocks[0].mlp.token_ids, more)


@pytest.mark.slow
def test_a_fed_model_compiles_into_one_graph():
    torch._dynamo.reset()
    model = Model("hash_moe", None, layers=1)
    model.blocks[0].mlp.z_weight = 0.5
    feed_tokens(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        tokens, mask = ids(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
        outcomes = []
        for call in (model, compiled):
            y = call(tokens, attention_mask=mask)
            outcomes.append({"output": y, **gradients(model, y.square().mean())})
        for name, wanted in outcomes[0].items():
            close(outcomes[1][name], wanted, name, 1e-9)


def test_a_memory_made_on_the_meta_device_is_completed():
    changes = dict(balance_rate=0.1, value_lr_scale=2.0, glu="silu")
    wanted = build("moe", **changes)
    with torch.device("meta"):
        memory = build("moe", **changes)
    memory = memory.to_empty(device="cpu")
    for tensor in (*memory.parameters(), *memory.buffers()):
        tensor.detach().fill_(7)
    memory.reset_buffers()
    for name, buffer in wanted.named_buffers():
        assert torch.equal(dict(memory.named_buffers())[name], buffer), name
