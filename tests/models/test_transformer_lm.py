"""The registered models: sizes, defaults, state, and the message for a checkpoint that does not
fit."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from fairseq import models, options
from fairseq.dataclass.configs import EMAConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.modules import SinusoidalPositionalEmbedding
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import Tensor, nn

from fairseq_sffn.errors import UsageError
from fairseq_sffn.memory import SparseMemory
from fairseq_sffn.memory.selectors.hash_layer import balanced_table
from fairseq_sffn.models.layer import SparseDecoderLayer
from fairseq_sffn.models.plugin_model import ModelSchema
from fairseq_sffn.optim.moving_average import MovingAverage
from tests.models.small_lm import (
    METHODS,
    SIZES,
    TYPES,
    build,
    language_modeling,
    lm_config,
    random_tokens,
    small_config,
    small_lm,
)

NAMED = ("sffn", *METHODS)
NAMES = [f"transformer_lm_{method}{size}" for method in NAMED for size in SIZES]


def on_meta(name: str, types: int = TYPES, **changes: Any) -> nn.Module:
    """Build a model whose parameters have shapes but take no memory."""
    if "_sffn" in name:
        changes = {"sffn_selector": "avgk", **changes}
    config = lm_config(name, tokens_per_sample=2048, **changes)
    with torch.device("meta"):
        return build(config, types)


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def memories(model: nn.Module) -> list[SparseMemory]:
    return [module for module in model.modules() if isinstance(module, SparseMemory)]


# Sizes


@pytest.mark.parametrize("method", NAMED)
@pytest.mark.parametrize(
    ("size", "layers", "width", "heads", "ffn", "activation", "sparse", "tied"),
    [
        ("", 6, 512, 8, 2048, "relu", [1, 3, 5], False),
        ("_tiny", 4, 128, 4, 512, "relu", [1, 3], True),
        ("_gpt3_medium", 24, 1024, 16, 4096, "gelu", [5, 11, 17, 23], True),
    ],
)
def test_every_size_builds(method, size, layers, width, heads, ffn, activation, sparse, tied):
    model = on_meta(f"transformer_lm_{method}{size}")
    decoder, cfg = model.decoder, model.decoder.cfg
    assert (len(decoder.layers), decoder.embed_dim) == (layers, width)
    assert (cfg.decoder.attention_heads, cfg.decoder.ffn_embed_dim) == (heads, ffn)
    assert str(cfg.activation_fn) == activation
    assert all(layer.normalize_before for layer in decoder.layers)
    assert isinstance(decoder.embed_positions, SinusoidalPositionalEmbedding)
    assert decoder.dropout_module.p == (0.0 if size == "_gpt3_medium" else 0.1)
    assert (decoder.output_projection.weight is decoder.embed_tokens.weight) == tied
    assert model.max_positions() == 2048
    built = [i for i, layer in enumerate(decoder.layers) if isinstance(layer, SparseDecoderLayer)]
    assert built == ([] if method == "dense" else sparse)
    active = {"pkm": 128, "gshard_8d": 2 * ffn}.get(method, ffn)  # as in their papers
    for memory in memories(model):
        assert memory.config.num_cells == 16 * ffn and memory.config.active_cells == active


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("dense", 354_740_224),
        ("avgk", 858_302_464),
        ("hash_layer", 858_302_464),
        ("switch", 858_302_464 + 65_536),
    ],
)
def test_parameters_of_the_papers_size(method, params):
    assert num_params(on_meta(f"transformer_lm_{method}_gpt3_medium", types=51200)) == params


@pytest.mark.parametrize(
    "changes",
    [
        dict(decoder_input_dim=8, decoder_output_dim=8),
        dict(adaptive_input=True, adaptive_input_cutoff="8,14"),
        dict(adaptive_softmax_cutoff="8,14"),
        dict(
            adaptive_input=True,
            adaptive_input_cutoff="8,14",
            adaptive_softmax_cutoff="8,14",
            tie_adaptive_weights=True,
        ),
        dict(character_embeddings=True, character_filters="[(1, 8), (2, 8)]"),
    ],
    ids=["projected", "adaptive-input", "adaptive-softmax", "adaptive-tied", "character"],
)
def test_embeddings_are_fairseqs(changes):
    changes["share_decoder_input_output_embed"] = False
    dense, sparse = small_lm("dense", **changes), small_lm("avgk", **changes)

    def shapes(model: nn.Module) -> dict[str, torch.Size]:
        parameters = model.named_parameters()  # tied ones once
        return {name: p.shape for name, p in parameters if ".layers.1." not in name}

    assert shapes(sparse) == shapes(dense)
    batch = random_tokens(2, 3)
    assert sparse(batch)[0].shape == dense(batch)[0].shape


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["adaptive_input", "character_embeddings"])
def test_embeddings_that_cannot_be_tied_are_refused(method, name):
    flag = "--" + name.replace("_", "-")
    told = f"^{flag}: [^\n]+ --no-share-decoder-input-output-embed$"
    with pytest.raises(UsageError, match=told):
        small_lm(method, **{name: True})


# State


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_round_trip(method, tmp_path):
    torch.manual_seed(1)
    model = small_lm(method).eval()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(2)
    other = small_lm(method).eval()
    batch = random_tokens(3, 5)
    expected = model(batch)[0]
    assert not torch.equal(other(batch)[0], expected)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(batch)[0], expected)


def tables(seed: int, **options: Any) -> list[Tensor]:
    torch.manual_seed(seed)
    state = small_lm("hash_layer", decoder_layers=4, **options).state_dict()
    found = [state[f"decoder.layers.{layer}.fc1.memory.selector.table"] for layer in (1, 3)]
    assert sum(".table" in name for name in state) == 2
    return found


def test_random_hash_tables_differ_between_layers_and_seeds():
    first, second = tables(1)
    assert first.shape == (TYPES,) and first.dtype == torch.int64
    assert not torch.equal(first, second)
    assert all(torch.equal(*pair) for pair in zip(tables(1), (first, second), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(tables(2), (first, second), strict=True))


def test_balanced_hash_tables_follow_the_dictionary():
    expected = balanced_table(language_modeling().dictionary.count, 16)
    for seed in (1, 2):
        assert all(torch.equal(table, expected) for table in tables(seed, hash_table="balanced"))


@pytest.mark.parametrize("saved", ["random", "balanced"])
def test_the_tables_of_a_checkpoint_win(saved):
    model = small_lm("hash_layer", hash_table=saved)
    other = small_lm("hash_layer", hash_table="random")
    other.load_state_dict(model.state_dict())
    ours, theirs = memories(model)[0].selector.table, memories(other)[0].selector.table
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_is_a_model_of_its_own(method, checkpoint_activations):
    model = small_lm(method, checkpoint_activations=checkpoint_activations)
    batch = random_tokens(3, 5)
    model(batch)[0].sum().backward()
    model.zero_grad()
    other = copy.deepcopy(model)

    def run(module):
        torch.manual_seed(1)  # sigma_moe draws which blocks it leaves out
        return module(batch)[0]

    expected, output = run(model), run(other)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.parameters())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(run(model), expected)
    assert not torch.equal(run(other), expected)


@pytest.mark.parametrize("method", METHODS)
def test_moving_average(method):
    # fairseq averages tied embeddings twice.
    model = small_lm(method, dtype=torch.float32, share_decoder_input_output_embed=False)
    ema = MovingAverage(model, EMAConfig(ema_decay=0.5, ema_fp32=True))
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.step(model)
    averaged = ema.get_model()
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter.data, start[name] + 0.5)
    for ours, theirs in zip(memories(averaged), memories(model), strict=True):
        if method == "hash_layer":
            assert torch.equal(ours.selector.table, theirs.selector.table)


# Checkpoints that do not fit


@pytest.mark.parametrize(
    ("saved", "wanted", "told"),
    [
        (
            dict(sffn_expansion=8),
            {},
            "decoder.layers.1.fc1.memory.keys is [256, 16] in the checkpoint and [512, 16] in the"
            " model (see --sffn-freq, --sffn-layers, --sffn-expansion, --decoder-ffn-embed-dim, ",
        ),
        (
            {},
            dict(sffn_freq=1),
            "only the model has decoder.layers.0.fc1.memory.keys (see --sffn-freq, --sffn-layers,",
        ),
        (
            dict(sffn_freq=1),
            {},
            "only the model has decoder.layers.0.fc1.weight (see --arch, --sffn-freq,"
            " --sffn-layers,",
        ),
        (
            dict(decoder_layers=3),
            {},
            "only the checkpoint has decoder.layers.2.self_attn.k_proj.weight"
            " (see --arch, --decoder-layers, --decoder-embed-dim)",
        ),
        (
            dict(types=30),
            {},
            "decoder.embed_tokens.weight is [30, 16] in the checkpoint and [20, 16] in the model"
            " (see dict.txt of the data, --decoder-embed-dim)",
        ),
        (
            dict(method="hash_layer"),
            {},
            "only the checkpoint has decoder.layers.1.fc1.memory.selector.table"
            " (see --sffn-selector, --sffn-layers, --sffn-expansion, --sffn-block-size,"
            " --avgk-exclude-bias,",
        ),
        (
            {},
            dict(avgk_center=True),
            "only the model has decoder.layers.1.fc1.memory.selector.hidden_totals"
            " (see --sffn-selector, --sffn-layers, --sffn-expansion, --sffn-block-size,"
            " --avgk-exclude-bias, --avgk-normalize-keys, --avgk-value-norm, --avgk-key-ema,"
            " --avgk-mean-of, --avgk-center)",
        ),
        (
            {},
            dict(sffn_balance_rate=0.1),
            "only the model has decoder.layers.1.fc1.memory.balancer.bias"
            " (see --sffn-balance-rate, --sffn-expansion, --sffn-block-size)",
        ),
        (
            # The tables are the same.
            dict(sffn_block_size=4),
            {},
            "decoder.layers.1.fc1.memory.block_size is 4 in the checkpoint and 8 in the model"
            " (see --sffn-block-size, --sffn-layers)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(saved, wanted, told):
    def model(method: str = "avgk", types: int = TYPES, **options: Any) -> nn.Module:
        return build(small_config(method, **options), types)

    with pytest.raises(UsageError) as caught:
        model(**wanted).load_state_dict(model(**saved).state_dict())
    text = str(caught.value)
    assert text.startswith(f"the checkpoint does not fit this model: {told}")
    assert text.endswith("train with the same --arch and model flags, or into another --save-dir")
    assert "\n" not in text


def test_a_checkpoint_with_something_else_in_place_of_a_tensor():
    model = small_lm("avgk")
    with pytest.raises(UsageError, match=r'[^\n]*"decoder\.layers\.1\.fc1\.memory\.keys"[^\n]*$'):
        model.load_state_dict({**model.state_dict(), "decoder.layers.1.fc1.memory.keys": 3})


# Defaults: --arch and hydra


@functools.cache
def from_arch(name: str, *flags: str) -> dict[str, Any]:
    """Return the model's config as fairseq-train makes it."""
    parser = options.get_training_parser()
    argv = ["data", "--task", "language_modeling", "--tokens-per-sample", "64", "--arch", name]
    config = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [*argv, *flags]))
    return plain(config.model)


def from_hydra(name: str, **overrides: Any) -> dict[str, Any]:
    """Return the model's config as fairseq-hydra-train makes it from ``model._name`` and
    overrides."""
    return plain(lm_config(name, tokens_per_sample=64, **overrides))


def plain(config: Any) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True, enum_to_str=True)


@pytest.mark.parametrize("name", NAMES)
def test_arch_and_hydra_resolve_to_the_same_config(name):
    ours = from_arch(name)
    assert ours == from_hydra(name)
    assert ours["_name"] == name
    assert ours["tokens_per_sample"] == 64
    # Both use the model that is registered under the name.
    assert models.ARCH_MODEL_REGISTRY[name] is models.MODEL_REGISTRY[name]


def test_a_schema_is_made_when_it_is_read():
    """Importing the plugin makes none, as all of them take as long as the rest of the import."""
    store, name = ConfigStore.instance(), NAMES[0]
    assert all(type(store.repo["model"][f"{each}.yaml"]) is ModelSchema for each in NAMES)
    schema = ModelSchema(name, models.MODEL_DATACLASS_REGISTRY[name])
    assert "node" not in vars(copy.deepcopy(schema))  # hydra copies the store for each command
    stored = store.load(f"model/{name}.yaml")
    assert (stored.name, stored.group, stored.provider) == (f"{name}.yaml", "model", "fairseq")
    assert stored.node == schema.node and stored.node._name == name
    stored.node.decoder_layers = 77
    assert store.load(f"model/{name}.yaml").node.decoder_layers != 77


USER = {
    "decoder_layers": 5,
    "decoder_embed_dim": 64,
    "decoder_ffn_embed_dim": 256,
    "decoder_attention_heads": 2,
    "activation_fn": "tanh",
    "dropout": 0.25,
    "sffn_freq": 3,
    "sffn_expansion": 4,
    "sffn_block_size": 32,
}
# Defaults of fairseq's transformer_lm that differ from ours
FAIRSEQS = {
    "decoder_layers": 6,
    "decoder_embed_dim": 512,
    "decoder_ffn_embed_dim": 2048,
    "decoder_attention_heads": 8,
    "activation_fn": "relu",
    "dropout": 0.1,
    "sffn_freq": 2,
}


@pytest.mark.parametrize("wanted", [USER, FAIRSEQS], ids=["others", "fairseqs-defaults"])
@pytest.mark.parametrize("name", ["dense", "avgk_tiny", "switch_gpt3_medium"])
def test_user_values_beat_defaults(name, wanted):
    defaults = from_arch(name := f"transformer_lm_{name}")
    wanted = {option: value for option, value in wanted.items() if option in defaults}
    flags = [("--" + option.replace("_", "-"), str(value)) for option, value in wanted.items()]
    config = from_arch(name, *(text for pair in flags for text in pair))
    assert config == from_hydra(name, **wanted)
    width = wanted["decoder_embed_dim"]  # these depend on the width
    assert config == defaults | wanted | dict(decoder_input_dim=width, decoder_output_dim=width)


@pytest.mark.parametrize(
    ("model", "flag", "option", "expected"),
    [
        ("avgk", "--share-decoder-input-output-embed", "share_decoder_input_output_embed", True),
        ("tiny", "--share-decoder-input-output-embed", "share_decoder_input_output_embed", True),
        (
            "tiny",
            "--no-share-decoder-input-output-embed",
            "share_decoder_input_output_embed",
            False,
        ),
        ("avgk", "--decoder-normalize-before", "decoder_normalize_before", True),
        ("avgk", "--no-decoder-normalize-before", "decoder_normalize_before", False),
    ],
)
def test_switches_do_what_their_names_say(model, flag, option, expected):
    name = f"transformer_lm_{'avgk_tiny' if model == 'tiny' else model}"
    config = from_arch(name, flag)
    assert config[option] is expected
    assert config == from_hydra(name, **{option: expected})


def test_options_of_selectors_pass_both_ways():
    name = "transformer_lm_hash_layer_tiny"
    config = from_arch(name, "--hash-table", "balanced")
    assert config["hash_table"] == "balanced"
    assert config == from_hydra(name, hash_table="balanced")
    name = "transformer_lm_avgk_tiny"
    config = from_arch(name, "--avgk-exclude-bias", "--sffn-gate", "sigmoid")
    assert (config["avgk_exclude_bias"], config["sffn_gate"]) == (True, "sigmoid")
    assert config == from_hydra(name, avgk_exclude_bias=True, sffn_gate="sigmoid")
