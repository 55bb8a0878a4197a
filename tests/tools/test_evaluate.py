"""``fairseq-sffn evaluate`` against ``fairseq-eval-lm``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fairseq_sffn.errors import UsageError
from fairseq_sffn.tools import cli
from tests import commands

FLAGS = ("--cpu", "--num-workers", "0", "--tokens-per-sample", "16")


@pytest.fixture(scope="module")
def checkpoint(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("trained")
    commands.train(data_bin, saved, "avgk")
    return saved / "checkpoint_last.pt"


@pytest.fixture
def other(data_bin: Path, tmp_path: Path) -> Path:
    """Make a folder whose validation split is another text."""
    for kind in ("bin", "idx"):
        shutil.copy(data_bin / f"train.{kind}", tmp_path / f"valid.{kind}")
    shutil.copy(data_bin / "dict.txt", tmp_path)
    return tmp_path


def evaluate(checkpoint: Path, *arguments: str, capsys: Any) -> dict[str, Any]:
    cli.main(["evaluate", str(checkpoint), *arguments, *FLAGS, "--json"])
    return json.loads(capsys.readouterr().out)


def test_each_set_is_what_fairseq_finds(checkpoint, data_bin, other, capsys):
    names = [f"{data_bin}:valid", f"{data_bin}:test", f"{other}:valid"]
    sets = evaluate(checkpoint, *names, capsys=capsys)["sets"]
    assert list(sets) == names
    for name, found in sets.items():
        folder, _, split = name.rpartition(":")
        flags = ("--gen-subset", split, "--max-tokens", "36000")
        expected = commands.evaluate(Path(folder), checkpoint, *flags)
        assert found["perplexity"] == pytest.approx(expected, abs=0.006)
        assert found["perplexity"] == pytest.approx(2 ** found["loss"])
    # Sentences with 8 words and an end
    assert [found["tokens"] for found in sets.values()] == [9 * 40, 9 * 40, 9 * 400]
    assert not any(found["left_out_tokens"] for found in sets.values())
    assert len({found["perplexity"] for found in sets.values()}) == 3


@pytest.fixture
def long(data_bin: Path, tmp_path: Path) -> Path:
    """Make a folder whose validation split has sentences longer than the model's 16 positions."""
    line = (data_bin.parent / "valid").read_text().splitlines()[0]
    (tmp_path / "long").write_text("".join(f"{' '.join([line] * n)}\n" for n in (1, 2, 1, 3)))
    commands.run(
        *("preprocess", "--only-source", "--workers", "1", "--destdir", tmp_path / "long-bin"),
        *("--srcdict", data_bin / "dict.txt", "--validpref", tmp_path / "long"),
    )
    return tmp_path / "long-bin"


@pytest.mark.parametrize(
    ("mode", "scored"), [("none", 60), ("eos", 18), ("complete", 18), ("complete_doc", 18)]
)
def test_tokens_are_those_that_are_scored(mode, scored, checkpoint, data_bin, long, capsys):
    name = f"{long}:valid"
    flags = ("--routing", name, "--sample-break-mode", mode)
    report = evaluate(checkpoint, name, f"{data_bin}:valid", *flags, capsys=capsys)
    counts = {"tokens": scored, "left_out_tokens": 60 - scored}
    assert report["routing_set"] == counts
    assert counts.items() <= report["sets"][name].items()
    other = report["sets"][f"{data_bin}:valid"]
    assert (other["tokens"], other["left_out_tokens"]) == (360, 0)
    (layer,) = report["routing"].values()
    assert sum(layer["counts"]) == scored * 4  # active blocks of 8 cells, of 32 units
    assert len(layer["positions"]) == scored

    cli.main(["evaluate", str(checkpoint), name, f"{data_bin}:valid", *flags, *FLAGS])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    if scored == 60:
        assert lines[:2] == [
            ["tokens", "bits/token", "perplexity"],
            [name, "60", *lines[1][2:]],
        ]
    else:
        assert lines[0] == ["tokens", "left", "out", "bits/token", "perplexity"]
        assert [line[:3] for line in lines[1:4]] == [
            [name, "18", "42"],
            [f"{data_bin}:valid", "360", "0"],
            ["routing", "18", "42"],
        ]


def test_a_shard_is_no_whole_set(checkpoint, data_bin, capsys):
    name = f"{data_bin}:valid"
    whole = evaluate(checkpoint, name, "--batch-size", "2", capsys=capsys)["sets"][name]
    shards = [
        evaluate(
            *(checkpoint, name, "--batch-size", "2", "--num-shards", "2", "--shard-id", shard),
            capsys=capsys,
        )["sets"][name]
        for shard in ("0", "1")
    ]
    for shard in shards:
        assert shard["tokens"] + shard["left_out_tokens"] == whole["tokens"] > shard["tokens"] > 0
    loss = sum(shard["loss"] * shard["tokens"] for shard in shards)
    assert loss / whole["tokens"] == pytest.approx(whole["loss"])


def test_losses_of_words_are_refused(checkpoint, data_bin, capsys):
    with pytest.raises(UsageError, match=r"^--post-process subword_nmt: [^\n]+$"):
        evaluate(checkpoint, f"{data_bin}:valid", "--post-process", "subword_nmt", capsys=capsys)


def test_routing_of_layers_that_differ(data_bin, tmp_path, capsys):
    commands.train(data_bin, tmp_path, "mixed")
    name = f"{data_bin}:valid"
    report = evaluate(tmp_path / "checkpoint_last.pt", name, "--routing", name, capsys=capsys)
    shapes = {layer: len(found["counts"]) for layer, found in report["routing"].items()}
    assert shapes == {"0": 16, "1": 64, "2": 16}
    used = {layer: sum(found["counts"]) for layer, found in report["routing"].items()}
    assert used == {"0": 360, "1": 4 * 360, "2": 360}
    # The table of the first layer is of pairs of tokens.
    assert report["routing"]["0"]["token_bits"] < report["routing"]["0"]["block_bits"]


def test_routing_is_that_of_its_own_set(checkpoint, data_bin, other, capsys):
    reports = [
        evaluate(checkpoint, f"{data_bin}:valid", "--routing", f"{folder}:valid", capsys=capsys)
        for folder in (data_bin, other)
    ]
    counts = []
    for report in reports:
        (layer,) = report["routing"].values()
        counts.append(sum(layer["counts"]))
    assert counts[1] == 10 * counts[0]


def test_routing_is_of_the_model_whose_perplexity_is_told(checkpoint, data_bin, capsys):
    name = f"{data_bin}:valid"
    counts = []
    for blocks in (1, 2):
        overrides = ("--model-overrides", f"{{'sffn_active_blocks': {blocks}}}")
        report = evaluate(checkpoint, name, "--routing", name, *overrides, capsys=capsys)
        (layer,) = report["routing"].values()
        counts.append(sum(layer["counts"]))
    assert counts[1] == 2 * counts[0]
    with pytest.raises(UsageError, match=r"--context-window 4: with --routing tokens would count"):
        evaluate(checkpoint, name, "--routing", name, "--context-window", "4", capsys=capsys)


@pytest.mark.parametrize(
    ("name", "message"),
    [("FOLDER", "must be FOLDER:SPLIT"), ("nowhere:test", r"there is no nowhere/test\.idx")],
)
def test_sets_that_are_none(name, message, checkpoint, capsys):
    with pytest.raises(UsageError, match=message):
        evaluate(checkpoint, name, capsys=capsys)
