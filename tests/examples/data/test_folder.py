"""A corpus from a folder of text files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from fairseq.data import Dictionary

from tests.examples.data.made import SCRIPTS, lines, make_folder, make_text, refusal

FLAGS = ["--pieces", "350", "--valid-share", "0.1", "--test-share", "0.1"]


def test_folder_recipe(data: SimpleNamespace, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "texts")
    data.folder.main([str(folder), str(tmp_path / "out"), *FLAGS])

    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    documents = {name: split["documents"] for name, split in manifest["splits"].items()}
    assert list(documents) == ["train", "valid", "test"]
    assert sum(documents.values()) == 60
    assert 6 <= documents["valid"] <= 7
    assert 6 <= documents["test"] <= 7
    assert manifest["documents"]["folder"]["copies"] == 1
    assert len(Dictionary.load(str(tmp_path / "out/bin/dict.txt"))) == 350 - 1 + 4
    # The README says: the files of the laptop corpus, without domains and downloads.
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("bin", "text", "spm.model", "dict.txt", "manifest.json", "work")
    }
    assert "leave `domains` out" in (SCRIPTS / "README.md").read_text()
    everything = [p for s in documents for p in lines(tmp_path / f"out/text/{s}.txt")]
    expected = [p for i in range(60) for p in make_text(("folder", i)).split("\n")]
    assert sorted(everything) == sorted(expected)


def test_folder_recipe_refuses_in_one_line(data: SimpleNamespace, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "texts")
    out = tmp_path / "out"

    def message(*argv: object) -> str:
        return refusal(data.folder, *argv)

    assert message(tmp_path / "nowhere", out) == f"{tmp_path}/nowhere: not a folder"
    assert "is in the folder" in message(folder, folder / "out")
    for flag in ("--workers", "--pieces"):
        for value in (0, -2):
            assert message(folder, out, flag, value) == f"{flag} {value}: must be at least 1"
    for value in ("0.6", "nan"):
        assert f"--test-share {value}: must" in message(folder, out, "--test-share", value)
    few = message(folder, tmp_path / "few", "--valid-share", "0.001")
    assert re.search(r"texts: no document for valid among 60: .*longer.*; dropped were 1 that", few)
    many = message(folder, tmp_path / "many", *FLAGS, "--pieces", "90000")
    assert "no vocabulary of 90000 pieces" in many
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    assert re.fullmatch(r"\S+bad\.txt: not a readable .*", message(folder, tmp_path / "bad"))


def test_folder_recipe_says_that_files_are_too_short(data: SimpleNamespace, tmp_path: Path) -> None:
    folder, out = tmp_path / "texts", tmp_path / "out"
    folder.mkdir()
    (folder / "a.txt").write_text(make_text("short", paragraphs=1)[:80])
    short = "dropped were 1 with less than 200 characters of text"
    nothing = refusal(data.folder, folder, out)
    assert nothing == f"{folder}: no document of 1 is left for train; {short}"
    (folder / "b.txt").write_text(make_text("long"))
    few = refusal(data.folder, folder, out)
    assert re.fullmatch(f"{folder}: no document for valid among 1: .*too few.*; {short}", few)


def test_folder_recipe_refuses_to_leave_held_out_splits_empty(
    data: SimpleNamespace, tmp_path: Path
) -> None:
    folder, out = tmp_path / "texts", tmp_path / "out"
    folder.mkdir()
    common = "This notice must be kept with every copy of the text that follows"
    for i in range(40):
        before, after = make_text(("common", i), paragraphs=2).split("\n")
        (folder / f"{i}.txt").write_text(f"{before} {common}: {after}")
    with pytest.raises(SystemExit) as stop:
        data.folder.main([str(folder), str(out), *FLAGS])
    assert re.fullmatch(
        rf'{folder}: nothing is left for valid, .* shares 13 .* as "{common.lower()}"',
        str(stop.value.code),
    )
    assert not (out / "work/steps/split.json").exists()
    assert not (out / "manifest.json").exists()
