"""Flags make the memory of a sparse layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fairseq.utils import get_activation_fn

from fairseq_sffn.errors import UsageError
from fairseq_sffn.memory import MemoryConfig, Selector
from fairseq_sffn.memory.selectors.hash_layer import balanced_table
from fairseq_sffn.models.config import DenseConfig, selector_flags, sparse
from fairseq_sffn.models.memory_config import (
    build_memory_config,
    build_memory_configs,
    check_supported,
)
from tests.models.small_lm import FFN, TYPES, WIDTH, lm_config, small_config, small_lm

COUNTS = [TYPES - i for i in range(TYPES)]


def memory_config(method: str, **options: Any) -> MemoryConfig:
    return build_memory_config(small_config(method, **options), TYPES, COUNTS)


# Defaults


@pytest.mark.parametrize(
    ("size", "width", "ffn"), [("", 512, 2048), ("_tiny", 128, 512), ("_gpt3_medium", 1024, 4096)]
)
@pytest.mark.parametrize(
    ("method", "block_size", "gate"),
    [
        ("avgk", 64, "none"),
        ("switch", None, "softmax"),
        ("hash_layer", None, "none"),
        ("moe", 64, "sigmoid_renormalized"),
        ("sigma_moe", 128, "sigmoid"),
        ("hash_moe", 64, "sqrt_softplus_renormalized"),
    ],
)
@pytest.mark.parametrize("by_flag", [False, True], ids=["named", "sffn"])
def test_defaults(method, block_size, gate, size, width, ffn, by_flag):
    args = (
        lm_config(f"transformer_lm_sffn{size}", sffn_selector=method)
        if by_flag
        else lm_config(f"transformer_lm_{method}{size}")
    )
    config = build_memory_config(args, TYPES, COUNTS)
    block_size = block_size or ffn
    assert (config.embed_dim, config.num_cells) == (width, 16 * ffn)
    assert (config.block_size, config.active_blocks) == (block_size, ffn // block_size)
    assert config.active_cells == ffn
    assert config.selector_options == Selector.registry[method].Config()
    assert config.gate_name == gate and config.bias
    assert config.capacity_factor == config.eval_capacity_factor == config.activation_dropout == 0
    assert config.init_scale == config.route_scale == 1 and config.engine is None
    activation = "gelu" if size == "_gpt3_medium" else "relu"
    assert config.activation is get_activation_fn(activation)


# Flags


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(sffn_expansion=4), dict(num_cells=4 * FFN)),
        (dict(sffn_block_size=4), dict(block_size=4, active_blocks=FFN // 4)),
        (dict(sffn_block_size=1), dict(block_size=1, active_blocks=FFN)),
        (dict(sffn_active_blocks=7), dict(block_size=8, active_blocks=7)),
        # A size that does not divide the FFN may divide the memory.
        (
            dict(sffn_block_size=64, sffn_active_blocks=1),
            dict(block_size=64, active_blocks=1, active_cells=64),
        ),
        (dict(sffn_gate="sigmoid"), dict(gate="sigmoid", gate_name="sigmoid")),
        (dict(sffn_capacity_factor=1.5), dict(capacity_factor=1.5, eval_capacity_factor=0)),
        (dict(sffn_eval_capacity_factor=2.0), dict(capacity_factor=0, eval_capacity_factor=2)),
        (dict(sffn_balance_rate=0.25), dict(balance_rate=0.25)),
        (
            dict(sffn_shared_blocks=2),
            dict(shared_blocks=2, num_blocks=64, routed_blocks=62, active_blocks=4),
        ),
        (
            dict(sffn_glu="silu", sffn_glu_width=48),
            dict(glu="silu", num_cells=16 * 48, active_blocks=6),
        ),
        (dict(sffn_init_scale=0.5), dict(init_scale=0.5)),
        (
            dict(sffn_route_scale=2.5, sffn_gate="sqrt_softplus"),
            dict(route_scale=2.5, gate="sqrt_softplus"),
        ),
        (dict(sffn_engine="loop"), dict(engine="loop")),
        (dict(activation_dropout=0.2), dict(activation_dropout=0.2)),
        (dict(relu_dropout=0.3), dict(activation_dropout=0.3)),
        (dict(activation_fn="gelu"), dict(activation=get_activation_fn("gelu"))),
        (dict(decoder_embed_dim=24), dict(embed_dim=24)),
        (dict(decoder_ffn_embed_dim=64), dict(num_cells=16 * 64, active_blocks=8)),
    ],
)
def test_flags_reach_the_memory(options, expected):
    config = memory_config("avgk", **options)
    assert {name: getattr(config, name) for name in expected} == expected
    (built,) = small_lm("avgk", **options).memory_configs.values()
    assert {name: getattr(built, name) for name in expected} == expected


@pytest.mark.parametrize("value", [True, False])
def test_options_of_the_selector(value):
    config = memory_config("avgk", avgk_exclude_bias=value)
    assert config.selector_options.exclude_bias is value
    selector = small_lm("avgk", avgk_exclude_bias=value).decoder.layers[1].fc1.memory.selector
    assert selector.exclude_bias is value


def test_counts_reach_the_table_of_hash_moe():
    config = memory_config("hash_moe", sffn_expansion=1, sffn_active_blocks=1)
    table = config.selector_class(config).table
    loads = torch.zeros(4, dtype=torch.int64)
    loads.scatter_add_(0, table[:, 0].long(), torch.tensor(COUNTS))
    assert loads.max() <= 1.2 * sum(COUNTS) / 4


def test_counts_reach_balanced_tables():
    config = memory_config("hash_layer", hash_table="balanced")
    assert config.vocab_size == TYPES
    table = config.selector_class(config).table
    assert torch.equal(table, balanced_table(COUNTS, 16))
    # An evenly used dictionary would have other counts.
    assert not torch.equal(table, balanced_table([1] * TYPES, 16))


def test_every_selector_has_its_flags():
    config = sparse("Config", DenseConfig)
    for selector in Selector.registry.values():
        assert selector_flags(selector).keys() <= config.__dataclass_fields__.keys()
    assert selector_flags(Selector.registry["avgk"]) == {
        "avgk_exclude_bias": "exclude_bias",
        "avgk_normalize_keys": "normalize_keys",
        "avgk_value_norm": "value_norm",
        "avgk_key_ema": "key_ema",
        "avgk_mean_of": "mean_of",
        "avgk_center": "center",
    }
    assert selector_flags(Selector.registry["hash_layer"]) == {"hash_table": "table"}
    options = {name for s in Selector.registry.values() for name in selector_flags(s)}
    assert all(config.__dataclass_fields__[name].default is None for name in options)


# Refusals


@contextmanager
def refused(told: str) -> Iterator[None]:
    with pytest.raises(UsageError) as caught:
        yield
    assert re.match(told, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("avgk", dict(sffn_expansion=0), "--sffn-expansion 0: "),
        ("avgk", dict(sffn_expansion=-2), "--sffn-expansion -2: "),
        ("avgk", dict(sffn_block_size=0), "--sffn-block-size 0: "),
        ("avgk", dict(sffn_block_size=-8), "--sffn-block-size -8: "),
        ("avgk", dict(sffn_block_size=12), "--sffn-block-size 12: .* --decoder-ffn-embed-dim 32"),
        (
            "avgk",
            dict(sffn_block_size=64),
            "--sffn-block-size 64: does not divide --decoder-ffn-embed-dim 32",
        ),
        (
            "avgk",
            dict(sffn_block_size=12, sffn_active_blocks=2),
            "--sffn-block-size 12: does not divide the 512 cells",
        ),
        ("avgk", dict(sffn_active_blocks=0), "--sffn-active-blocks 0: "),
        ("avgk", dict(sffn_active_blocks=65), "--sffn-active-blocks 65: .* 64 blocks"),
        ("avgk", dict(sffn_shared_blocks=-1), "--sffn-shared-blocks -1: must not be negative"),
        ("avgk", dict(sffn_shared_blocks=4), "--sffn-shared-blocks 4: leaves none of the 4 act"),
        ("avgk", dict(sffn_shared_blocks=9), "--sffn-shared-blocks 9: is more than the 4 active"),
        ("switch", dict(sffn_shared_blocks=1), "--sffn-shared-blocks 1: leaves none of the 1 ac"),
        (
            "avgk",
            dict(sffn_shared_blocks=4, sffn_expansion=1),
            "--sffn-shared-blocks 4: shares every block, .* use a dense model",
        ),
        (
            "hash_layer",
            dict(sffn_shared_blocks=1, sffn_active_blocks=3),
            r"--sffn-active-blocks 2: hash_layer uses one block \(beside shared_blocks 1\)",
        ),
        (
            "avgk",
            dict(sffn_shared_blocks=1, sffn_expert_parallel=2),
            "--sffn-expert-parallel 2: does not divide the 63 blocks of a layer that are not sh",
        ),
        ("switch", dict(sffn_active_blocks=17), "--sffn-active-blocks 17: .* 16 blocks"),
        ("hash_layer", dict(sffn_active_blocks=2), "--sffn-active-blocks 2: hash_layer"),
        ("hash_layer", dict(sffn_gate="softmax"), "--sffn-gate softmax: hash_layer"),
        ("avgk", dict(sffn_capacity_factor=-1.0), "--sffn-capacity-factor -1.0: "),
        ("avgk", dict(sffn_eval_capacity_factor=-1.0), "--sffn-eval-capacity-factor -1.0: "),
        ("avgk", dict(sffn_init_scale=0.0), "--sffn-init-scale 0.0: must be positive and finite$"),
        (
            "avgk",
            dict(sffn_init_scale=math.inf),
            "--sffn-init-scale inf: must be positive and finite$",
        ),
        (
            "gshard",
            dict(decoder_ffn_embed_dim=33),
            "--sffn-block-size 16: the default of gshard, does not divide .*-ffn-embed-dim 33",
        ),
        ("avgk", dict(activation_dropout=1.0), "--activation-dropout 1.0: "),
        ("avgk", dict(relu_dropout=1.0), "--relu-dropout 1.0: "),
        ("avgk", dict(sffn_capacity_factor=math.inf), "--sffn-capacity-factor inf: "),
        ("avgk", dict(sffn_init_scale=math.nan), "--sffn-init-scale nan: "),
        ("switch", dict(sffn_route_scale=0.0), "--sffn-route-scale 0.0: must be positive and"),
        ("avgk", dict(sffn_route_scale=2.5), "--sffn-route-scale 2.5: .* the gate is none$"),
        (
            "avgk",
            dict(sffn_engine="grouped", sffn_block_size=2),
            "--sffn-engine grouped: .* 2 x 16",
        ),
        (
            "avgk",
            dict(hash_table="balanced"),
            "--hash-table balanced: .* hash_layer, .* selects by avgk",
        ),
        (
            "switch",
            dict(avgk_exclude_bias=True),
            "--avgk-exclude-bias True: .* avgk, .* selects by switch",
        ),
        (
            "hash_layer",
            dict(avgk_exclude_bias=False),
            "--avgk-exclude-bias False: .* avgk, .* selects by hash_layer",
        ),
    ],
)
def test_what_cannot_be_honoured_is_told_in_one_line(method, options, told):
    args = small_config(method, **options)
    with refused(told):
        build_memory_configs(args, TYPES, COUNTS)


@pytest.mark.parametrize("counts", [None, COUNTS[:-1]])
def test_counts_that_do_not_fit_are_refused(counts):
    args = small_config("hash_layer", hash_table="balanced")
    with refused("(--hash-table balanced|vocab size 20): .*counts"):
        build_memory_config(args, TYPES, counts)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(scale_fc=True), "--scale-fc: "),
        (dict(quant_noise_pq=0.1), "--quant-noise-pq 0.1: "),
        (dict(quant_noise_scalar=0.1), "--quant-noise-scalar 0.1: "),
        (dict(base_layers=1), "--base-layers 1: "),
        (dict(decoder_layers_to_keep="0;1"), "--decoder-layers-to-keep 0;1: "),
        (dict(decoder_layers_to_keep="1,2"), "--decoder-layers-to-keep 1,2: .* of 0 to 1$"),
        (dict(decoder_layers_to_keep="1,1"), "--decoder-layers-to-keep 1,1: must be different"),
        (dict(sffn_freq=0), "--sffn-freq 0: .* --decoder-layers 2"),
        (dict(sffn_freq=3), "--sffn-freq 3: .* --decoder-layers 2"),
    ],
)
def test_what_a_sparse_layer_cannot_do_is_refused_by_the_model(options, told):
    check_supported(small_config("avgk"), ["decoder"])
    with refused(told):
        small_lm("avgk", **options)


@pytest.mark.parametrize("width", [WIDTH, 24])
def test_widths_follow_the_embeddings(width):
    config = small_config("avgk", decoder_embed_dim=width)
    assert config.decoder_input_dim == config.decoder_output_dim == width
