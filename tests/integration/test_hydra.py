"""Models by ``--arch`` and by fairseq-hydra-train are the same."""

from pathlib import Path
from typing import Any

import pytest
from fairseq import options, tasks
from fairseq.dataclass.initialize import add_defaults
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf, open_dict

from tests import commands
from tests.commands import USER_DIR, losses
from tests.integration.flags import MODELS, OF_MODEL, RECIPE, SMALLER
from tests.integration.outputs import last_checkpoint, logged


@pytest.mark.parametrize("model", [*MODELS, "mixed"])
def test_hydra_trains_what_arch_trains(model: str, data_bin: Path, tmp_path: Path) -> None:
    overrides = (*SMALLER, *OF_MODEL.get(model, ()), f"model._name={commands.arch(model)}")
    hydra_log = commands.hydra_train(data_bin, tmp_path / "hydra", *overrides)
    arch_log = commands.train(data_bin, tmp_path / "arch", model, *RECIPE)
    assert len(losses(hydra_log)) == 6
    assert logged(hydra_log, "loss", "gnorm", "lr") == logged(arch_log, "loss", "gnorm", "lr")
    by_hydra, by_arch = (last_checkpoint(tmp_path / way)["cfg"] for way in ("hydra", "arch"))
    for part in ("model", "criterion", "optimizer", "lr_scheduler"):
        assert by_hydra[part] == by_arch[part]


def arch_config(data: Path, arch: str, *flags: str) -> Any:
    parser = options.get_training_parser("language_modeling")
    base = [str(data), "--user-dir", USER_DIR, "--task", "language_modeling", "--arch", arch]
    return convert_namespace_to_omegaconf(
        options.parse_args_and_arch(parser, [*base, "--optimizer", "adam", *flags])
    )


def hydra_resolved(config: Any, arch: str, **model: Any) -> Any:
    config = OmegaConf.create(OmegaConf.to_container(config))
    with open_dict(config):
        config.model = {"_name": arch, **model}
        config.task = {"_name": "language_modeling", "data": config.task.data}
    add_defaults(config)
    return OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True))


@pytest.fixture(scope="module")
def some_hydra_config(data_bin: Path) -> Any:
    return commands.hydra_config(commands.override("task.data", data_bin))


@pytest.mark.parametrize("size", ["", "_gpt3_medium"])  # _tiny was just trained
@pytest.mark.parametrize("model", MODELS)
def test_names_resolve_to_the_same_model(
    model: str, size: str, data_bin: Path, some_hydra_config: Any
) -> None:
    arch = f"transformer_lm_{model}{size}"
    by_arch = arch_config(data_bin, arch).model
    assert hydra_resolved(some_hydra_config, arch).model == by_arch
    expected = {"": 512, "_gpt3_medium": 1024}[size]
    assert by_arch.decoder_embed_dim == by_arch.decoder_output_dim == expected


DEFAULTS = {
    "share_decoder_input_output_embed": True,
    "decoder_normalize_before": True,
    "decoder_layers": 4,
    "sffn_freq": 2,
}
ASKED = {
    ("--share-decoder-input-output-embed",): {"share_decoder_input_output_embed": True},
    ("--decoder-normalize-before",): {"decoder_normalize_before": True},
    ("--dropout", "0.3"): {"dropout": 0.3},
    ("--activation-fn", "gelu"): {"activation_fn": "gelu"},
    ("--decoder-layers", "6"): {"decoder_layers": 6},
    ("--decoder-embed-dim", "32"): {"decoder_embed_dim": 32},
    ("--decoder-ffn-embed-dim", "64"): {"decoder_ffn_embed_dim": 64},
    ("--sffn-freq", "1"): {"sffn_freq": 1},
    ("--sffn-expansion", "4"): {"sffn_expansion": 4},
    ("--sffn-gate", "softmax"): {"sffn_gate": "softmax"},
    ("--avgk-exclude-bias",): {"avgk_exclude_bias": True},
    ("--decoder-input-dim", "8"): {"decoder_input_dim": 8},
    ("--decoder-output-dim", "8"): {"decoder_output_dim": 8},
}
ASKED_OTHERWISE = {
    ("--no-share-decoder-input-output-embed",): {"share_decoder_input_output_embed": False},
    ("--no-decoder-normalize-before",): {"decoder_normalize_before": False},
}


@pytest.mark.parametrize("asked", [{(): DEFAULTS}, ASKED, ASKED_OTHERWISE])
def test_user_flags_beat_defaults(
    asked: dict[tuple[str, ...], dict[str, Any]], data_bin: Path, some_hydra_config: Any
) -> None:
    expected = {name: value for values in asked.values() for name, value in values.items()}
    flags = [word for flag in asked for word in flag]
    by_arch = arch_config(data_bin, "transformer_lm_avgk_tiny", *flags).model
    options = expected if flags else {}
    by_hydra = hydra_resolved(some_hydra_config, "transformer_lm_avgk_tiny", **options).model
    assert {name: by_arch[name] for name in expected} == expected
    assert by_arch == by_hydra


def test_flags_tie_and_untie_the_built_model(data_bin: Path) -> None:
    def build(*flags: str) -> Any:
        config = arch_config(data_bin, "transformer_lm_avgk_tiny", *commands.SMALL, *flags)
        config.model.sffn_block_size = 8
        return tasks.setup_task(config.task).build_model(config.model).decoder

    tied = build("--share-decoder-input-output-embed")
    assert tied.output_projection.weight is tied.embed_tokens.weight
    untied = build("--no-share-decoder-input-output-embed", "--no-decoder-normalize-before")
    assert untied.output_projection.weight is not untied.embed_tokens.weight
    assert tied.layer_norm is not None and untied.layer_norm is None
