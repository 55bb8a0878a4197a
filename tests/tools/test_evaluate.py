"""``fairseq-sffn evaluate`` against ``fairseq-eval-lm``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import commands
import pytest

from fairseq_sffn.errors import UsageError
from fairseq_sffn.tools import cli

FLAGS = ("--cpu", "--num-workers", "0", "--tokens-per-sample", "16")


@pytest.fixture(scope="module")
def checkpoint(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("trained")
    commands.train(data_bin, saved, "avgk")
    return saved / "checkpoint_last.pt"


@pytest.fixture
def other(data_bin: Path, tmp_path: Path) -> Path:
    """A folder whose validation split is another text."""
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
    # Of sentences with 8 words and an end.
    assert [found["tokens"] for found in sets.values()] == [9 * 40, 9 * 40, 9 * 400]
    assert len({found["perplexity"] for found in sets.values()}) == 3


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
