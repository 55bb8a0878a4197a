"""Gated FFNs in dense layers, and sparse layers with gated cells."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fairseq.models.transformer import TransformerDecoder
from torch import Tensor, nn

from fairseq_sffn.errors import UsageError
from fairseq_sffn.memory import Selector
from fairseq_sffn.models.gated import GatedDecoderLayer, GatedLinear, GatedTransformerDecoder
from tests.memory.cases import close
from tests.models import test_transformer as translation
from tests.models.small_lm import FFN, PAD, WIDTH, random_tokens, small_lm

GATED_WIDTH = 64
FULL_KEYS = sorted(name for name, cls in Selector.registry.items() if cls.key_table == "full")
WHOLE = {
    **{name: dict(sffn_block_size=8) for name in ("avgk", "vanilla_m", "rand_hash")},
    **{"pkm_ffn": dict(sffn_gate="none"), "gshard": dict(sffn_gate="none")},
    **{"switch": dict(sffn_gate="none"), "base": dict(sffn_gate="none"), "hash_layer": {}},
    **{name: dict(sffn_gate="none") for name in ("moe", "sigma_moe", "hash_moe")},
}
"""Selector -> options with which all blocks may be active and weigh nothing."""


def as_sparse(state: dict[str, Tensor], sparse: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model with gated dense layers by the names of a sparse one."""
    own = {"fc1.gate_proj.weight": "keys", "fc1.gate_proj.bias": "key_bias"}
    own |= {"fc1.up_proj.weight": "up", "fc1.up_proj.bias": "up_bias"}
    own |= {"fc2.weight": "values", "fc2.bias": "value_bias"}
    result = sparse.state_dict()
    for name, tensor in state.items():
        layer, fc, rest = name.partition(".fc")
        memory = f"{layer}.fc1.memory"
        if fc and ".memory." not in name and f"{memory}.keys" in result:
            table = own["fc" + rest]
            name, tensor = f"{memory}.{table}", tensor.t() if table == "values" else tensor
        result[name] = tensor
    return result


# The width


@pytest.mark.parametrize(
    ("ffn", "width"), [(FFN, 64), (512, 320), (2048, 1344), (3072, 2048), (4096, 2752)]
)
@pytest.mark.parametrize("method", ["dense", "avgk"])
def test_the_default_width_is_two_thirds(method: str, ffn: int, width: int) -> None:
    model = small_lm(method, decoder_ffn_embed_dim=ffn, sffn_glu="silu")
    fc1, fc2 = model.decoder.layers[0].fc1, model.decoder.layers[0].fc2
    assert fc1.gate_proj.weight.shape == fc1.up_proj.weight.shape == (width, WIDTH)
    assert fc2.weight.shape == (WIDTH, width)
    if method == "avgk":
        (config,) = model.memory_configs.values()
        assert (config.num_cells, config.active_cells) == (16 * width, width)


def test_a_given_width_is_that_of_all_layers() -> None:
    model = small_lm("switch", sffn_glu="gelu", sffn_glu_width=40)
    (config,) = model.memory_configs.values()
    assert model.decoder.layers[0].fc2.in_features == config.block_size == 40
    assert (config.glu, config.num_blocks, config.active_blocks) == ("gelu", 16, 1)


# Computation


@pytest.mark.parametrize(("glu", "function"), [("silu", F.silu), ("gelu", F.gelu)])
def test_a_dense_layer_is_a_gated_ffn(glu: str, function: Any) -> None:
    layer = small_lm("dense", sffn_glu=glu, activation_dropout=0.5).decoder.layers[0].eval()
    assert isinstance(layer, GatedDecoderLayer) and isinstance(layer.fc1, GatedLinear)
    x = torch.randn(5, 3, WIDTH, dtype=torch.float64)
    ffn_in: list[Tensor] = []
    layer.final_layer_norm.register_forward_hook(lambda module, args, out: ffn_in.append(out))
    attended: list[Tensor] = []
    layer.final_layer_norm.register_forward_pre_hook(lambda module, args: attended.append(*args))
    output, *_ = layer(x)
    hidden = function(layer.fc1.gate_proj(ffn_in[0])) * layer.fc1.up_proj(ffn_in[0])
    close(output, attended[0] + layer.fc2(hidden), tolerance=1e-12)
    torch.manual_seed(1)
    trained, *_ = layer.train()(x)
    torch.manual_seed(1)
    hidden = layer.activation_dropout_module(hidden)
    close(trained, attended[0] + layer.fc2(hidden), tolerance=1e-12)


def test_models_without_the_flag_are_fairseqs() -> None:
    assert type(small_lm("dense").decoder) is TransformerDecoder
    assert type(small_lm("dense", sffn_glu="silu").decoder) is GatedTransformerDecoder


@pytest.mark.parametrize("glu", ["silu", "gelu"])
@pytest.mark.parametrize("selector", FULL_KEYS)
def test_all_blocks_active_is_the_dense_model(selector: str, glu: str) -> None:
    """Outputs and all gradients agree for the same weights."""
    dense = small_lm("dense", sffn_glu=glu)
    sparse = small_lm(selector, sffn_glu=glu, sffn_expansion=1, sffn_freq=1, **WHOLE[selector])
    sparse.load_state_dict(as_sparse(dense.state_dict(), sparse))
    tokens = random_tokens(3, 6)
    ours, theirs = sparse(tokens)[0], dense(tokens)[0]
    close(ours, theirs, "logits", 1e-12)
    cotangent = torch.randn_like(ours)
    (ours * cotangent).sum().backward()
    (theirs * cotangent).sum().backward()
    wanted = {name: parameter.grad for name, parameter in dense.named_parameters()}
    wanted = as_sparse(wanted, sparse)
    for name, parameter in sparse.named_parameters():
        if ".selector." not in name:  # without a gate, routers have no gradient
            close(parameter.grad, wanted[name], name, 1e-12)


@pytest.mark.parametrize("selector", ["avgk", "switch"])
def test_translation_models_are_gated_on_both_sides(selector: str) -> None:
    """A dense gated layer is a sparse one with all blocks active."""
    options = dict(sffn_glu="silu", sffn_expansion=1, **WHOLE[selector])
    half = translation.build(selector, sffn_freq=2, **options)
    whole = translation.build(selector, sffn_freq=1, **options)
    whole.load_state_dict(as_sparse(half.state_dict(), whole))
    for side in (half.encoder, half.decoder):
        assert isinstance(side.layers[0].fc1, GatedLinear)
        (config,) = side.memory_configs.values()
        assert side.layers[0].fc2.in_features == config.num_cells == GATED_WIDTH
    source = translation.padded([random_tokens(6), random_tokens(4)], left=True)
    target = translation.padded([random_tokens(5), random_tokens(3)], left=False)
    outputs = [translation.call(model, source, target)[0] for model in (half, whole)]
    close(*outputs, "logits", 1e-10)
    assert source.eq(PAD).any()


@pytest.mark.parametrize("method", ["dense", "avgk"])
def test_checkpointed_activations_change_no_gradient(method: str) -> None:
    plain = small_lm(method, sffn_glu="silu")
    checkpointed = small_lm(method, sffn_glu="silu", checkpoint_activations=True)
    checkpointed.load_state_dict(plain.state_dict())
    tokens = random_tokens(3, 6)
    for model in (plain, checkpointed):
        model(tokens)[0].square().sum().backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        close(parameter.grad, wanted[name].grad, name, 1e-12)


# Refusals


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("pkm", dict(sffn_glu="silu"), "--sffn-glu silu: pkm "),
        ("pkm_4d", dict(sffn_glu="gelu"), "--sffn-glu gelu: pkm "),
        ("lorkm", dict(sffn_glu="silu"), "--sffn-glu silu: lorkm "),
        ("dense", dict(sffn_glu_width=64), "--sffn-glu-width 64: needs --sffn-glu$"),
        ("avgk", dict(sffn_glu_width=64), "--sffn-glu-width 64: needs --sffn-glu$"),
        ("dense", dict(sffn_glu="silu", sffn_glu_width=0), "--sffn-glu-width 0: must be at "),
        ("avgk", dict(sffn_glu="silu", sffn_glu_width=-3), "--sffn-glu-width -3: must be at "),
        (
            "avgk",
            dict(sffn_glu="silu", sffn_block_size=48),
            "--sffn-block-size 48: does not divide --sffn-glu-width 64; ",
        ),
        (
            "avgk",
            dict(sffn_glu="silu", sffn_block_size=128),
            "--sffn-block-size 128: does not divide --sffn-glu-width 64; ",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    method: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError) as caught:
        small_lm(method, **options)
    assert re.match(told, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "saved", "wanted", "told"),
    [
        ("dense", {}, dict(sffn_glu="silu"), "only the model has .*gate_proj.weight .see --sffn-g"),
        ("dense", dict(sffn_glu="silu"), {}, "only the model has .*fc1.weight .see .*--sffn-glu,"),
        (
            "dense",
            dict(sffn_glu="silu"),
            dict(sffn_glu="silu", sffn_glu_width=32),
            r".*gate_proj.weight is \[64, 16\] .* --sffn-glu-width",
        ),
        (
            "avgk",
            dict(sffn_glu="silu"),
            dict(sffn_glu="gelu"),
            ".*memory.glu is silu in the checkpoint and gelu in the model .see --sffn-glu,",
        ),
        (
            "avgk",
            dict(sffn_glu="silu", sffn_glu_width=32, sffn_freq=1),
            dict(sffn_freq=1),
            "only the checkpoint has .*memory.up.* .see --sffn-glu,",
        ),
        (
            "avgk",
            {},
            dict(sffn_shared_blocks=2),
            "only the model has .*memory.shared.keys .see --sffn-shared-blocks, ",
        ),
        (
            "avgk",
            dict(sffn_shared_blocks=2),
            dict(sffn_shared_blocks=3),
            r".*memory.keys is \[496, 16\] .* --sffn-shared-blocks, ",
        ),
        (
            "avgk",
            dict(sffn_glu="silu", sffn_freq=1),
            dict(sffn_glu="silu", sffn_glu_width=32, sffn_freq=1),
            r".*memory.keys is \[1024, 16\] .* --sffn-glu-width, ",
        ),
    ],
)
def test_a_checkpoint_with_other_ffns_is_refused(
    method: str, saved: dict[str, Any], wanted: dict[str, Any], told: str
) -> None:
    state = small_lm(method, **saved).state_dict()
    with pytest.raises(UsageError) as caught:
        small_lm(method, **wanted).load_state_dict(state)
    told = f"the checkpoint does not fit this model: {told}"
    assert re.match(told, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
