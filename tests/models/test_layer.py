"""A sparse decoder layer against fairseq's layer."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from fairseq.models.transformer import TransformerConfig
from fairseq.modules import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from fairseq.utils import get_activation_fn
from torch import Tensor, nn

from fairseq_sffn.memory import MemoryConfig, SparseMemory
from fairseq_sffn.models.layer import LayerRouting, SparseDecoderLayer
from tests.models.small_lm import FFN, TYPES, WIDTH, random_tokens, small_config, small_lm

LENGTH, BATCH = 5, 3


def layers(
    selector: str = "avgk", gate: str | None = None, block_size: int = FFN, **options: Any
) -> tuple[TransformerDecoderLayerBase, SparseDecoderLayer]:
    """Build fairseq's layer, and a sparse one with its weights and all blocks active."""
    args = small_config("dense", **options)
    config = TransformerConfig.from_namespace(args)
    dense = TransformerDecoderLayerBase(config, no_encoder_attn=True).double()
    memory_config = MemoryConfig(
        embed_dim=WIDTH,
        num_cells=FFN,
        block_size=block_size,
        active_blocks=FFN // block_size,
        selector=selector,
        gate=gate,
        activation=get_activation_fn(args.activation_fn),
        vocab_size=TYPES,
    )
    sparse = SparseDecoderLayer(config, memory_config, no_encoder_attn=True).double()
    with torch.no_grad():
        ours, theirs = by_fairseqs_names(sparse), dict(dense.named_parameters())
        assert ours.keys() == theirs.keys()
        for name, parameter in theirs.items():
            parameter.normal_(std=0.3)
            ours[name].copy_(parameter)
    return dense, sparse


def by_fairseqs_names(
    sparse: SparseDecoderLayer, of: Callable[[Any], Tensor] = lambda parameter: parameter
) -> dict[str, Tensor]:
    """Apply ``of`` to each parameter, and return the results by the names of fairseq's layer."""
    memory = sparse.fc1.memory
    named = {name: of(p) for name, p in sparse.named_parameters() if not name.startswith("fc1.")}
    named |= {"fc1.weight": of(memory.keys), "fc1.bias": of(memory.key_bias)}
    return named | {"fc2.weight": of(memory.values).t(), "fc2.bias": of(memory.value_bias)}


def inputs() -> tuple[Tensor, dict[str, Tensor]]:
    """Make hidden states and the arguments of both layers: causal, one position is padding."""
    x = torch.randn(LENGTH, BATCH, WIDTH, dtype=torch.float64)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, -1] = True
    future = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)
    return x, {"self_attn_mask": future, "self_attn_padding_mask": padding}


def tokens(length: int = LENGTH) -> dict[str, Tensor]:
    return {"token_ids": random_tokens(length, BATCH, 1)}


def close(actual: Tensor, expected: Tensor, name: str = "") -> None:
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=1e-12, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("normalize_before", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("activation_fn", ["relu", "gelu"])
@pytest.mark.parametrize(
    ("selector", "gate", "block_size"),
    [
        *(("avgk", "none", block_size) for block_size in (1, 4, 8, FFN)),
        ("avgk", "renormalized", FFN),
        ("switch", "renormalized", FFN),
        ("switch", "none", 8),
        ("hash_layer", "none", FFN),
    ],
)
def test_all_blocks_active_is_fairseqs_layer(
    selector, gate, block_size, activation_fn, normalize_before
):
    dense, sparse = layers(
        selector,
        gate,
        block_size,
        activation_fn=activation_fn,
        decoder_normalize_before=normalize_before,
    )
    x, kwargs = inputs()
    dense_x, sparse_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, *_ = dense(dense_x, **kwargs)
    actual, *_ = sparse(sparse_x, **kwargs, **tokens())
    close(actual, expected, "output")

    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    actual.backward(cotangent)
    close(sparse_x.grad, dense_x.grad, "x")
    grads = by_fairseqs_names(sparse, attrgetter("grad"))
    for name, parameter in dense.named_parameters():
        assert parameter.grad.any(), name
        close(grads[name], parameter.grad, name)


def test_incremental_state_reaches_attention():
    dense, sparse = layers()
    x, _ = inputs()
    states: tuple[dict, dict] = {}, {}
    for step in x.split(1):
        expected, *_ = dense(step, incremental_state=states[0])
        actual, *_ = sparse(step, incremental_state=states[1], **tokens(length=1))
        close(actual, expected)


@pytest.mark.parametrize("flag", ["activation_dropout", "relu_dropout"])
def test_activation_dropout_is_fairseqs(flag):
    dense, sparse = layers(dropout=0.1, **{flag: 0.5})
    x, kwargs = inputs()
    plain, *_ = sparse.eval()(x, **kwargs)
    for training in (True, False):
        torch.manual_seed(1)
        expected, *_ = dense.train(training)(x, **kwargs)
        torch.manual_seed(1)
        actual, *_ = sparse.train(training)(x, **kwargs)
        # One block keeps the order of the tokens, so both draw the same mask.
        close(actual, expected)
        assert torch.equal(actual, plain) != training


def test_activation_dropout_drops_its_share_of_cells_and_keeps_the_mean():
    _, sparse = layers(block_size=4, activation_dropout=0.25)
    memory = sparse.fc1.memory
    with torch.no_grad():  # every cell gives 1 in the first feature
        memory.keys.zero_(), memory.values.zero_(), memory.value_bias.zero_()
        memory.key_bias.fill_(1), memory.values[:, 0].fill_(1)
    kept = memory(torch.zeros(4000, WIDTH, dtype=torch.float64)).output[:, 0] * 0.75
    close(kept, kept.round())
    assert abs(kept.mean() / FFN - 0.75) < 0.01


def test_retain_dropout_reaches_the_memory():
    model = small_lm("avgk", activation_dropout=0.5).eval()
    batch = random_tokens(2, 8)
    assert torch.equal(model(batch)[0], model(batch)[0])
    model.make_generation_fast_(retain_dropout=True)
    assert not torch.equal(model(batch)[0], model(batch)[0])
    (dropout,) = {m.dropout for m in model.modules() if isinstance(m, SparseMemory)}
    assert isinstance(dropout, FairseqDropout) and dropout.apply_during_inference


def test_what_the_layer_returns_beyond_fairseqs_outputs():
    _, sparse = layers("switch", block_size=8)
    x, _ = inputs()
    padding_mask = torch.zeros(LENGTH, BATCH, dtype=torch.bool)
    padding_mask[-1, 1] = True
    _, attn, state, *rest = sparse(x, padding_mask=padding_mask, **tokens())
    assert attn is None and state is None
    routing = LayerRouting(*rest)
    assert routing.counts.tolist() == 4 * [LENGTH * BATCH - 1]
    # Each block takes a quarter of the assignments.
    assert routing.balance_loss.item() == pytest.approx(1, abs=1e-6)
    assert routing.z_loss > 0 and routing.dropped == 0


def test_a_selector_without_scores_has_no_losses():
    _, sparse = layers("hash_layer")
    outputs = sparse(inputs()[0], **tokens())
    routing = LayerRouting(*outputs[-len(LayerRouting._fields) :])
    assert routing.counts.tolist() == routing.importance.tolist() == [LENGTH * BATCH]
    others = routing._replace(counts=torch.zeros(1), importance=torch.zeros(1))
    assert not any(others)


def attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the attributes of each module, by its name."""
    return {name: dict(vars(child)) for name, child in module.named_modules()}


def test_nothing_is_kept_of_a_pass():
    _, sparse = layers("hash_layer")
    x, _ = inputs()
    before = attributes(sparse)
    with pytest.raises(ValueError, match="token"):
        sparse(x)
    assert attributes(sparse) == before
    sparse(x, **tokens())
    assert attributes(sparse) == before


def gradients(model: nn.Module, batch: Tensor) -> tuple[dict[str, Tensor], dict[str, LayerRouting]]:
    """Compute gradients of a loss in which the balance and z losses weigh as much as the output."""
    torch.manual_seed(1)
    output, extra = model(batch, routing_losses=True)
    loss = output.square().mean()
    for layer in extra["routing"].values():
        loss = loss + layer.balance_loss + 0.1 * layer.z_loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, extra["routing"]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("method", ["avgk", "switch", "hash_layer", "mixed"])
def test_checkpointed_activations_give_the_same_gradients(method, offload):
    dropout = dict(dropout=0.1, attention_dropout=0.1, activation_dropout=0.1)
    model = small_lm(method, **dropout)
    checkpointed = small_lm(
        method, checkpoint_activations=True, offload_activations=offload, **dropout
    )
    checkpointed.load_state_dict(model.state_dict())
    assert all(hasattr(layer, "precheckpoint_forward") for layer in checkpointed.decoder.layers)
    batch = random_tokens(3, 8)
    batch[1, -2:] = 1
    expected, expected_routing = gradients(model, batch)
    actual, routing = gradients(checkpointed, batch)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.any(), name
        close(actual[name], grad, name)

    # 24 tokens, 2 of them padding. They are counted once, although the layer runs twice.
    assert routing.keys() == expected_routing.keys() == model.memory_configs.keys()
    for name, layer in routing.items():
        assert layer.counts.sum() == 22 * model.memory_configs[name].active_blocks
        for ours, theirs in zip(layer, expected_routing[name], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_balance_loss_alone_moves_the_router(checkpoint_activations):
    model = small_lm("switch", checkpoint_activations=checkpoint_activations)
    _, extra = model(random_tokens(3, 8), routing_losses=True)
    extra["routing"]["layer1"].balance_loss.backward()
    router = model.decoder.layers[1].fc1.memory.selector.router
    assert router.grad.abs().sum() > 1e-3


@pytest.mark.parametrize("method", ["dense", "avgk"])
def test_offloading_is_of_checkpointed_activations(method):
    layers = small_lm(method, offload_activations=True).decoder.layers
    assert all(hasattr(layer, "precheckpoint_forward") for layer in layers)
