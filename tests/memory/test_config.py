import dataclasses
import pickle

import pytest
import torch
from oracle import CASES, build

from fairseq_sffn.memory import ConfigError, MemoryConfig, SparseMemory
from fairseq_sffn.memory.selectors.avgk import AvgK
from fairseq_sffn.memory.selectors.hash_layer import HashLayer
from fairseq_sffn.memory.selectors.switch import Switch

SIZES = dict(embed_dim=8, num_cells=64, block_size=4, active_blocks=4)
HASH = dict(selector="hash_layer", active_blocks=1, vocab_size=10)
BALANCED = {**HASH, "selector": HashLayer.Config(table="balanced")}


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        (dict(embed_dim=0), "embed_dim", 0),
        (dict(num_cells=-4), "num_cells", -4),
        (dict(block_size=0), "block_size", 0),
        (dict(active_blocks=0), "active_blocks", 0),
        (dict(block_size=5), "block_size", 5),
        (dict(block_size=128), "block_size", 128),
        (dict(active_blocks=17), "active_blocks", 17),
        (dict(selector="nothing"), "selector", "nothing"),
        (dict(gate="nothing"), "gate", "nothing"),
        (dict(gate=""), "gate", ""),
        (dict(HASH, gate="softmax"), "gate", "softmax"),
        (dict(activation="nothing"), "activation", "nothing"),
        (dict(HASH, vocab_size=None), "vocab_size", None),
        (dict(HASH, vocab_size=0), "vocab_size", 0),
        (dict(HASH, vocab_size=-3), "vocab_size", -3),
        (dict(capacity_factor=-1.0), "capacity_factor", -1.0),
        (dict(eval_capacity_factor=-0.5), "eval_capacity_factor", -0.5),
        (dict(capacity_factor=float("nan")), "capacity_factor", "nan"),
        (dict(capacity_factor=float("inf")), "capacity_factor", "inf"),
        (dict(eval_capacity_factor=float("nan")), "eval_capacity_factor", "nan"),
        (dict(eval_capacity_factor=float("inf")), "eval_capacity_factor", "inf"),
        (dict(activation_dropout=1.0), "activation_dropout", 1.0),
        (dict(activation_dropout=-0.1), "activation_dropout", -0.1),
        (dict(activation_dropout=float("nan")), "activation_dropout", "nan"),
        (dict(engine="nothing"), "engine", "nothing"),
        (dict(engine="grouped", block_size=1), "engine", "grouped"),
        (dict(engine="grouped", embed_dim=6), "engine", "grouped"),
        (dict(init_scale=0.0), "init_scale", 0.0),
        (dict(init_scale=-1.0), "init_scale", -1.0),
        (dict(init_scale=float("nan")), "init_scale", "nan"),
        (dict(init_scale=float("inf")), "init_scale", "inf"),
        (dict(HASH, active_blocks=2), "active_blocks", 2),
        (dict(HASH, selector=HashLayer.Config(table="nothing")), "table", "nothing"),
        (BALANCED, "table", "balanced"),
        (dict(BALANCED, token_counts=[1] * 9), "vocab_size", 10),
    ],
)
def test_refused_in_one_line(changes, field, value):
    with pytest.raises(ConfigError) as caught:
        MemoryConfig(**{**SIZES, **changes})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{field} {value}: ") and not message.endswith(": ")
    assert (caught.value.field, str(caught.value.value)) == (field, str(value))
    assert isinstance(caught.value, ValueError)


def test_the_message_names_the_other_sizes():
    with pytest.raises(ConfigError, match=r"block_size 5: .* 64 cells"):
        MemoryConfig(**{**SIZES, "block_size": 5})
    with pytest.raises(ConfigError, match=r"active_blocks 17: .* 16 blocks"):
        MemoryConfig(**{**SIZES, "active_blocks": 17})


def test_sizes():
    config = MemoryConfig(**SIZES)
    assert (config.num_blocks, config.active_cells) == (16, 16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_num_params_are_those_of_the_module(case, bias):
    memory = build(case, bias=bias)
    assert memory.config.num_params() == sum(p.numel() for p in memory.parameters())


@pytest.mark.parametrize("case", CASES)
def test_cost_of_every_token_using_everything(case):
    config = build(case).config
    if config.selector_class is not HashLayer:
        whole = dataclasses.replace(config, active_blocks=config.num_blocks)
        assert whole.active_params() == whole.num_params() == config.num_params()


@pytest.mark.parametrize(
    ("changes", "params", "active", "flops"),
    [
        # d = 8, 64 cells, 4 blocks of 4 cells active: keys + values, then biases.
        (dict(), 2 * 64 * 8 + 64 + 8, 2 * 16 * 8 + 16 + 8, 2 * 16 * 8 + 4 * 16 * 8),
        (dict(bias=False), 2 * 64 * 8, 2 * 16 * 8, 2 * 16 * 8 + 4 * 16 * 8),
        (
            dict(selector="switch", block_size=16, active_blocks=1),
            2 * 64 * 8 + 64 + 8 + 4 * 8,
            2 * 16 * 8 + 16 + 8 + 4 * 8,
            2 * 4 * 8 + 4 * 16 * 8,
        ),
        (dict(HASH, block_size=16), 2 * 64 * 8 + 64 + 8, 2 * 16 * 8 + 16 + 8, 4 * 16 * 8),
    ],
    ids=["avgk", "without bias", "switch", "hash_layer"],
)
def test_cost_by_hand(changes, params, active, flops):
    config = MemoryConfig(**{**SIZES, **changes})
    assert config.num_params() == params
    assert config.active_params() == active
    assert config.flops_per_token() == flops
    assert config.selection_flops_per_token() == flops - 4 * config.active_cells * 8


@pytest.mark.parametrize(
    ("selector", "gate"), [("avgk", "none"), ("switch", "softmax"), ("hash_layer", "none")]
)
def test_default_gate(selector, gate):
    assert MemoryConfig(**{**SIZES, **HASH, "selector": selector}).gate_name == gate


@pytest.mark.parametrize("options", [AvgK.Config(), AvgK.Config(exclude_bias=True)])
def test_a_selector_is_named_or_given_as_its_options(options):
    config = MemoryConfig(**SIZES, selector=options)
    assert config.selector_class is AvgK and config.selector_options == options
    assert MemoryConfig(**SIZES, selector="avgk").selector_options == AvgK.Config()


def test_any_function_is_an_activation():
    config = MemoryConfig(**SIZES, activation=torch.sin, bias=False)
    assert config.activation_fn is torch.sin
    memory = SparseMemory(dataclasses.replace(config, active_blocks=16))
    x = torch.randn(3, 8)
    torch.testing.assert_close(memory(x).output, torch.sin(x @ memory.keys.t()) @ memory.values)


@pytest.mark.parametrize("selector", ["avgk", AvgK.Config(exclude_bias=True), "switch"])
def test_pickles(selector):
    config = MemoryConfig(**SIZES, selector=selector)
    assert pickle.loads(pickle.dumps(config)) == config


def test_default_options_pickle():
    config = MemoryConfig(**SIZES, selector=Switch.Config())
    assert pickle.loads(pickle.dumps(config)) == config
