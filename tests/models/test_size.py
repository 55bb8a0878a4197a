"""Models that are too large for a machine are refused before they are built."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fairseq import models

from fairseq_sffn.errors import UsageError
from fairseq_sffn.models import size
from fairseq_sffn.models.size import BYTES, check_size, in_words, parts_of
from fairseq_sffn.tools.cli import main
from tests import commands
from tests.models.small_lm import build, dictionary, language_modeling, small_config

HUGE = 10**12


def refusal(config: Any) -> str:
    with pytest.raises(UsageError) as stopped:
        models.build_model(config, language_modeling())
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


@pytest.mark.parametrize(
    ("method", "option", "what"),
    [
        ("avgk", dict(sffn_expansion=HUGE), "its tables take 4.1 PB"),
        ("switch", dict(sffn_expansion=HUGE), "its tables take 4.1 PB"),
        ("pkm_ffn", dict(sffn_expansion=HUGE), "its tables take 4.1 PB"),
        ("lorkm", dict(sffn_expansion=HUGE), "its tables take 2.05 PB"),
        ("hash_layer", dict(sffn_expansion=HUGE), "its tables take 4.1 PB"),
        ("avgk", dict(decoder_ffn_embed_dim=HUGE), "its tables take 2.05 PB"),
        ("avgk", dict(decoder_layers=HUGE), "its tables take 32.8 PB"),
        ("dense", dict(sffn_glu_width=HUGE), "its dense FFNs take 384 TB"),
        ("avgk", dict(sffn_glu_width=HUGE), "its tables take 3.07 PB"),
        ("dense", dict(decoder_layers=HUGE), "its attention layers take 4.1 PB"),
        ("dense", dict(decoder_embed_dim=HUGE), "its attention layers take 32 YB"),
        ("dense", dict(decoder_ffn_embed_dim=HUGE), "its dense FFNs take 256 TB"),
        ("dense", dict(tokens_per_sample=HUGE), "its positions take 64 TB"),
        ("dense", dict(decoder_input_dim=HUGE), "its embeddings take 80 TB"),
    ],
)
def test_sizes_that_no_machine_holds(method: str, option: dict[str, int], what: str) -> None:
    name, value = next(iter(option.items()))
    tokens = option.pop("tokens_per_sample", 16)
    glu = {"sffn_glu": "silu"} if name == "sffn_glu_width" else {}
    config = small_config(method, **option, **glu)
    config.tokens_per_sample = tokens
    memory = in_words(size.physical_memory())
    flag = "--" + name.replace("_", "-")
    assert refusal(config) == f"{flag} {value}: {what} in fp32, this machine has {memory}"


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("size", ["layers", "embed_dim", "ffn_embed_dim"])
def test_sizes_of_an_encoder_decoder_model(side: str, size: str) -> None:
    sizes = {"layers": 2, "embed_dim": 16, "ffn_embed_dim": 32}
    args = {f"{s}_{name}": value for s in ("encoder", "decoder") for name, value in sizes.items()}
    args |= {f"{s}_attention_heads": 2 for s in ("encoder", "decoder")}
    args |= {"max_source_positions": 16, "max_target_positions": 16}
    args[f"{side}_{size}"] = HUGE
    both = SimpleNamespace(source_dictionary=dictionary(), target_dictionary=dictionary())
    for name in ("transformer", "transformer_avgk"):
        sparse = {"sffn_freq": 2, "sffn_expansion": 4, "sffn_expert_parallel": 1}
        sparse |= {"sffn_selector": "avgk"}
        options = SimpleNamespace(_name=name, **args, **(sparse if name != "transformer" else {}))
        with pytest.raises(UsageError, match=f"^--{side}-{size.replace('_', '-')} {HUGE}: its "):
            check_size(options, both)


@pytest.mark.parametrize(
    "glu", [{}, dict(sffn_glu="silu"), dict(sffn_glu="silu", sffn_glu_width=64)]
)
@pytest.mark.parametrize("method", ["dense", "avgk", "switch", "gshard", "vanilla_m", "rand_hash"])
def test_parts_are_those_of_the_model(method: str, glu: dict[str, Any]) -> None:
    """The estimate leaves out only small parts: biases, norms and routers."""
    sizes = dict(decoder_embed_dim=64, decoder_ffn_embed_dim=256, decoder_layers=4)
    config = small_config(method, **sizes, **glu)
    counted = sum(part.params for part in parts_of(config, language_modeling()))
    positions = 16 * 64  # computed, not trained
    params = sum(parameter.numel() for parameter in build(config).parameters()) + positions
    assert 0.95 * params < counted <= params


@pytest.mark.parametrize("method", ["pkm", "pkm_ffn"])
def test_selectors_that_no_machine_holds(method: str) -> None:
    told = refusal(small_config(method, **{f"{method}_query_dim": HUGE}))
    flag = f"--{method.replace('_', '-')}-query-dim"
    assert re.match(f"{flag} {HUGE}: the selector of a layer takes .* TB in fp32, this ", told)


def test_blocks_of_other_processes_take_no_memory() -> None:
    args = small_config("avgk", sffn_expansion=1000)
    alone = {part.name: part.params for part in parts_of(args, language_modeling())}
    args.sffn_expert_parallel = 4
    sharded = {part.name: part.params for part in parts_of(args, language_modeling())}
    table = 1000 * 32 * 16
    assert alone.pop("tables") == 2 * table
    # The process's share, and a table that is drawn as a whole.
    assert sharded.pop("tables") == 2 * table // 4 + table
    assert alone == sharded


def test_processes_share_the_memory_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    args = small_config("dense")
    needed = sum(part.params for part in parts_of(args, language_modeling())) * BYTES
    monkeypatch.setattr(size, "physical_memory", lambda: needed)
    check_size(args, language_modeling())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    told = "the parameters of this model take .* in fp32 in 2 processes, this machine has "
    with pytest.raises(UsageError, match=told):
        check_size(args, language_modeling())


def test_only_layers_that_are_kept_count(monkeypatch: pytest.MonkeyPatch) -> None:
    args = small_config("dense", decoder_layers=10)
    whole = sum(part.params for part in parts_of(args, language_modeling()))
    args.decoder_layers_to_keep = "0,9"
    kept = sum(part.params for part in parts_of(args, language_modeling()))
    assert kept == sum(p.params for p in parts_of(small_config("dense"), language_modeling()))
    assert kept < whole


@pytest.mark.parametrize("command", ["cost", "plan"])
@pytest.mark.parametrize("method", ["avgk", "switch", "dense"])
def test_commands_that_count_know_larger_models(command: str, method: str, capsys: Any) -> None:
    flags = ["--arch", f"transformer_lm_{method}_tiny", "--vocab-size", "100", "--json"]
    flags += ["--decoder-ffn-embed-dim", str(2**40)]
    if command == "plan":
        flags += ["--world-size", "1", "--tokens-per-rank", "16"]
    main([command, *flags])
    assert re.search(r"\d{15}", capsys.readouterr().out)


@pytest.mark.parametrize("arch", ["transformer_lm_avgk_tiny", "transformer_lm"])
def test_training(arch: str, data_bin: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        commands.train(
            *(data_bin, tmp_path, "dense", "--arch", arch, "--decoder-ffn-embed-dim", str(HUGE))
        )
    assert re.match(rf"--decoder-ffn-embed-dim {HUGE}: its .* take .* in fp32", stopped.value.code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (24.6e9, "24.6 GB"),
        (999_900, "1 MB"),
        (1.2e18, "1.2 EB"),
    ],
)
def test_sizes_in_words(number: float, words: str) -> None:
    assert in_words(number) == words
