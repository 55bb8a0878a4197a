"""The bytes of activations, against the tensors that autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fairseq_sffn.memory import SparseMemory
from fairseq_sffn.tools.activations import activation_bytes, memory_bytes
from tests.models.small_lm import METHODS
from tests.tools.planned import LENGTH, TOKENS, WIDTH, lm, loss_and_kept_bytes


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("method", METHODS)
def test_activations_are_what_autograd_keeps(method: str, activation: str) -> None:
    model = lm(method, activation_fn=activation)
    measured = loss_and_kept_bytes(model)[1]
    parts = activation_bytes(model, TOKENS, LENGTH, 1, torch.float32)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.004)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("avgk", dict(sffn_gate="softmax")),
        ("avgk", dict(sffn_gate="sigmoid", sffn_freq=1)),
        ("avgk", dict(sffn_gate="sqrt_softplus")),
        ("switch", dict(sffn_gate="sqrt_softplus")),
        ("moe", dict(sffn_gate="sqrt_softplus_renormalized", sffn_route_scale=2.5)),
        ("moe", dict(sffn_gate="renormalized")),
        ("hash_moe", dict(sffn_gate="sigmoid")),
        ("aoe", dict(sffn_gate="softmax", aoe_rank=3)),
        ("aoe", dict(sffn_block_size=16)),
        ("vanilla_m", dict(sffn_gate="sigmoid", vanilla_m_aggregate="l2")),
        ("avgk", dict(sffn_gate="sigmoid", avgk_normalize_keys=True, avgk_value_norm=True)),
        ("avgk", dict(sffn_gate="sigmoid", avgk_key_ema=0.9)),
        ("vanilla_m", dict(sffn_gate="sigmoid")),
        ("vanilla_m", dict(sffn_gate="softmax", sffn_block_size=16)),
        ("vanilla_m", dict(sffn_gate="sigmoid", vanilla_m_aggregate="avg_abs")),
        ("pkm", dict(pkm_coefficients="activation")),
        ("switch", dict(decoder_output_dim=32, share_decoder_input_output_embed=False)),
        ("switch", dict(decoder_input_dim=32, share_decoder_input_output_embed=False)),
        ("dense", dict(sffn_glu="silu")),
        ("avgk", dict(sffn_shared_blocks=3)),
        ("switch", dict(sffn_shared_blocks=1, sffn_active_blocks=3, sffn_glu="silu")),
        ("pkm", dict(sffn_shared_blocks=8)),
        ("avgk", dict(sffn_glu="silu")),
        ("avgk", dict(sffn_glu="gelu", sffn_gate="softmax", sffn_freq=1)),
        ("vanilla_m", dict(sffn_glu="silu")),
        ("pkm_ffn", dict(sffn_glu="gelu")),
        ("sffn", dict(sffn_layers="switch:0,avgk/block_size=16/gate=softmax:1")),
        ("dense", dict(layernorm_embedding=True, activation_fn="gelu_accurate")),
    ],
)
def test_activations_of_other_models(method: str, options: dict[str, Any]) -> None:
    model = lm(method, **options)
    measured = loss_and_kept_bytes(model)[1]
    parts = activation_bytes(model, TOKENS, LENGTH, 1, torch.float32)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.004)


@pytest.mark.parametrize("method", ["dense", "avgk", "switch"])
def test_activations_in_half_precision(method: str) -> None:
    model = lm(method, activation_fn="gelu").bfloat16()
    measured = loss_and_kept_bytes(model)[1]
    parts = activation_bytes(model, TOKENS, LENGTH, 1, torch.bfloat16)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.004)


def test_shared_blocks_keep_x_where_the_others_are_sharded() -> None:
    """Without a gate, only the dispatched rows are kept for the blocks of two ranks."""
    memory = lm("avgk", sffn_shared_blocks=2).decoder.layers[1].fc1.memory
    routed = SparseMemory(memory.config.routed)
    whole, alone = (memory_bytes(m, TOKENS, 2, torch.float32) for m in (memory, routed))
    assert whole - alone == TOKENS * (WIDTH + memory.config.shared_cells) * 4


def test_dropout_keeps_masks() -> None:
    """A mask has a byte per number, which dropout on a CPU does not have."""
    kept = [
        sum(activation_bytes(lm("avgk", **options), TOKENS, LENGTH, 1, torch.float32).values())
        for options in (dict(), dict(dropout=0.1), dict(dropout=0.1, activation_dropout=0.1))
    ]
    assert kept[1] - kept[0] == TOKENS * WIDTH * (1 + 2 * 2)
    assert kept[2] - kept[1] == TOKENS * 256 * (1 + 4) * 2
