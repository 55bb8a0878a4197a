"""The command ``fairseq-sffn``, and its ``cost``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from fairseq_sffn.models.transformer_lm import METHODS, SIZES
from fairseq_sffn.tools import cli
from fairseq_sffn.tools.cost import model_cost
from tests.commands import ROOT
from tests.models.small_lm import build, lm_config

NAMES = ("dense", *(method.name for method in METHODS))
TOTALS = ("params", "active_params", "flops_per_token")
KEYS = (*TOTALS, "train_zettaflops", "selection_share", "overhead_vs_dense")
AVGK = ("--arch", "transformer_lm_avgk_gpt3_medium", "--vocab-size", "51200", "--context", "2048")
SMALL = ("--arch", "transformer_lm_avgk_tiny", "--vocab-size", "100")


def cost(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Run ``fairseq-sffn cost`` and return its output."""
    cli.main(["cost", *flags])
    return capsys.readouterr().out


def cost_json(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    return json.loads(cost(capsys, *flags, "--json"))


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = cost(capsys, *AVGK, "--tokens", "60e9")
    cells = [re.split(r"  +", line) for line in table.splitlines()]
    lines = {label: values for label, *values in cells}
    assert cells[0] == ["transformer_lm_avgk_gpt3_medium: 51,200 types, context 2,048"]
    assert cells[2] == ["", "parameters", "active", "FLOPs/token"]
    assert cells[5] == ["selection", "0", "0", "8,388,608"]
    assert lines["selection"] == ["+0.95% of the dense model's training FLOPs"]
    assert lines["total"] == ["858,302,464", "354,740,224", "918,552,576"]
    assert lines["training on 60,000,000,000 tokens"] == ["0.2142 zettaFLOPs"]
    assert lines["mean keys, in no total"] == ["268,435,456 FLOPs a step"]
    assert max(map(len, table.splitlines())) <= 80
    assert len({len(row) for row in table.splitlines()[2:10]}) == 1  # aligned to the right
    assert "zettaFLOPs" not in cost(capsys, *SMALL)
    assert "mean keys" not in cost(capsys, *SMALL, "--arch", "transformer_lm_switch_tiny")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    figures = cost_json(capsys, *AVGK, "--tokens", "60e9")
    assert set(KEYS) < set(figures)
    assert figures["params"] == 858_302_464
    assert round(figures["train_zettaflops"], 4) == 0.2142
    assert figures["vocab_size"] == 51200 and figures["context"] == 2048
    assert figures["tokens"] == 60e9
    assert cost_json(capsys, *SMALL)["train_zettaflops"] is None


@pytest.mark.parametrize("size", SIZES)
def test_gated_cells_fit_the_default_blocks(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("avgk", "gshard", "hash_layer", "moe", "sigma_moe"):
        flags = ("--arch", f"transformer_lm_{name}{size}", "--vocab-size", "100")
        gated, plain = cost_json(capsys, *flags, "--sffn-glu", "silu"), cost_json(capsys, *flags)
        part = gated["parts"]["memory"]["params"] / plain["parts"]["memory"]["params"]
        assert 0.9 < part < 1.1, name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_model(name: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The parts of the cost add up, and the model is the one that fairseq-hydra-train builds."""
    arch, options = f"transformer_lm_{name}{size}", {}
    if name == "sffn":
        options = {"sffn_selector": "gshard"}
    flags = [text for option in options for text in (f"--sffn-{option[5:]}", options[option])]
    figures = cost_json(capsys, "--arch", arch, "--vocab-size", "1000", *flags)
    parts = figures["parts"]
    assert list(parts) == [
        *("attention", "dense_ffn", "selection", "memory", "vocabulary", "other")
    ]
    for key in TOTALS:
        assert figures[key] == sum(part[key] for part in parts.values())
    if name == "dense":
        assert figures["overhead_vs_dense"] == figures["selection_share"] == 0
        assert figures["active_params"] == figures["params"]
        assert set(parts["memory"].values()) == set(parts["selection"].values()) == {0}
    else:
        assert figures["active_params"] < figures["params"] and parts["memory"]["params"]
    if size == "_tiny":
        model = build(lm_config(arch, tokens_per_sample=1024, **options), types=1000)
        assert figures["params"] == sum(parameter.numel() for parameter in model.parameters())
        assert figures["flops_per_token"] == model_cost(model, 1024).flops_per_token


def test_flags_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    plain = cost_json(capsys, *SMALL)
    assert plain["context"] == 1024
    smaller = cost_json(capsys, "--sffn-block-size", "16", *SMALL, "--decoder-layers", "2")
    selection = [figures["parts"]["selection"] for figures in (smaller, plain)]
    assert selection[0]["flops_per_token"] == 2 * selection[1]["flops_per_token"]
    for part in ("attention", "memory"):
        assert 2 * smaller["parts"][part]["params"] == plain["parts"][part]["params"]
    untied = cost_json(capsys, *SMALL, "--no-share-decoder-input-output-embed")
    assert untied["params"] - plain["params"] == 100 * 128
    learned = cost_json(capsys, *SMALL, "--decoder-learned-pos", "--context", "50")
    assert learned["parts"]["other"]["params"] - plain["parts"]["other"]["params"] == 52 * 128


def test_a_model_of_fairseq(capsys: pytest.CaptureFixture[str]) -> None:
    """It has twelve layers of width 768, and learned positions. fairseq adds two positions."""
    figures = cost_json(capsys, "--arch", "transformer_lm_gpt3_small", "--vocab-size", "100")
    layers = 12 * (12 * 768**2 + 13 * 768)
    assert figures["params"] == layers + 2 * 768 + (100 + 1026) * 768
    assert figures["flops_per_token"] == 12 * (24 * 768**2 + 4 * 1024 * 768) + 2 * 100 * 768


def test_a_table_of_counts_costs_what_a_random_one_costs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--arch", "transformer_lm_hash_layer_tiny", "--vocab-size", "100")
    assert cost_json(capsys, *flags, "--hash-table", "balanced") == cost_json(capsys, *flags)


REFUSED = [
    ("--arch transformer_lm_avgk_gpt3_mediun", "there is transformer_lm_avgk_gpt3_medium"),
    ("--arch nonsense", "is unknown"),
    ("--arch transformer", "this is an encoder-decoder model"),
    ("--arch lstm_lm", "this command is for Transformer language models"),
    ("--arch transformer_lm_megatron", "this command is for Transformer language models"),
    ("--arch transformer_lm_sffn", None),
    ("--vocab-size 0", "must be at least 1"),
    ("--vocab-size -7", "must be at least 1"),
    ("--vocab-size 4", "must be at least 5"),
    ("--context 0", "must be at least 1"),
    ("--context -1", "must be at least 1"),
    ("--tokens nan", "must be positive and finite"),
    ("--tokens inf", "must be positive and finite"),
    ("--tokens 0.0", "must be positive and finite"),
    ("--decoder-layers 0", "must be at least 1"),
    ("--decoder-embed-dim -8", "must be at least 1"),
    ("--decoder-ffn-embed-dim 0", "must be at least 1"),
    ("--decoder-attention-heads 7", "must divide --decoder-embed-dim 128"),
    ("--decoder-output-dim 64", "cannot be shared"),
    ("--sffn-block-size 7", "does not divide --decoder-ffn-embed-dim 512"),
    ("--sffn-selector switch", "this model selects by avgk"),
    ("--adaptive-input", "depends on the token"),
    ("--adaptive-softmax-cutoff 20,40", "depends on the token"),
    ("--character-embeddings", "are not counted"),
    ("--base-layers 1", "are not counted"),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED)
def test_wrong_input_is_refused_in_one_line(
    flags: str, reason: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cost(capsys, *SMALL, *flags.split())
    line = stopped.value.code
    assert isinstance(line, str) and "\n" not in line
    if reason is None:
        assert line == "--sffn-selector: is required by this model, or --sffn-layers"
    else:
        assert line.startswith(f"{flags}: ") and reason in line
    assert capsys.readouterr() == ("", "")


def test_adaptive_architectures_name_the_flag_that_they_set(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match=r"^--adaptive-input: .*\(set by transformer_lm_wiki103\)"):
        cost(capsys, *SMALL, "--arch", "transformer_lm_wiki103")


@pytest.mark.parametrize("flags", [["--nonsense", "3"], ["nonsense"], ["--vocab", "5"]])
def test_unknown_flags_are_usage_errors(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cost(capsys, *SMALL, *flags)
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {' '.join(flags)}" in capsys.readouterr().err


def test_only_a_subcommand_that_wants_unknown_flags_gets_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Plain:
        """Prints."""

        add_arguments = staticmethod(lambda parser: None)
        run = staticmethod(lambda args: "done")

    monkeypatch.setitem(cli.COMMANDS, "plain", Plain)
    cli.main(["plain"])
    assert capsys.readouterr().out == "done\n"
    with pytest.raises(SystemExit):
        cli.main(["plain", "--decoder-layers", "2"])
    assert "unrecognized arguments: --decoder-layers 2" in capsys.readouterr().err


def test_as_a_module_and_outside_the_checkout(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fairseq_sffn", "cost", *SMALL]
    asked = subprocess.run(
        [*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(asked.stdout)["arch"] == "transformer_lm_avgk_tiny"
    refused = subprocess.run(
        [*command, "--context", "0"], cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.endswith("--context 0: must be at least 1\n")
    assert "Traceback" not in refused.stderr


def test_installed_command() -> None:
    name, target = re.search(r'"(\S+) = (\S+)"', (ROOT / "setup.py").read_text()).groups()
    assert name == "fairseq-sffn"
    assert EntryPoint(name, target, "console_scripts").load() is cli.main
