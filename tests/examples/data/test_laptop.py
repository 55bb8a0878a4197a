"""The laptop corpus from small packages that are already fetched."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
from fairseq.data import Dictionary, indexed_dataset

from tests.examples.data.made import lines, make_text, write_archive

SOURCES = [
    {"name": "manual", "file": "manual.whl", "role": "train", "reader": "html"},
    {"name": "guide", "file": "guide.tgz", "role": "train", "reader": "text"},
    {"name": "poems", "file": "poems.tgz", "role": "domain", "reader": "text", "listings": True},
]


def page(text: str) -> bytes:
    paragraphs = "".join(f"<p>{line}</p>" for line in text.split("\n"))
    return f"<html><body><nav>Menu</nav>{paragraphs}</body></html>".encode()


def make_packages(folder: Path) -> Path:
    """Make fetched packages of three sources in folder/downloads, and return the file that lists
    them."""
    quoted = make_text(("poems", 2)).split("\n")[1]
    contents = {
        "manual": {f"doc/{i}.html": page(make_text(("manual", i))) for i in range(80)},
        "guide": {
            f"doc/{i}.txt": make_text(("guide", i)).replace("\n", "\n\n").encode()
            for i in range(80)
        },
        "poems": {
            f"doc/{i}.txt": make_text(("poems", i)).replace("\n", "\n\n").encode()
            for i in range(30)
        },
    }
    contents["guide"]["doc/quotes.txt"] = f"{make_text('q')}\n\nThey wrote: {quoted}".encode()
    contents["guide"]["doc/copy.txt"] = contents["guide"]["doc/3.txt"]
    sources = []
    for source in SOURCES:
        name = source["name"]
        directory = folder / "downloads" / name
        directory.mkdir(parents=True)
        write_archive(directory / source["file"], contents[name])
        (directory / "package.txt").write_text(f"{name}-doc 1.0\n")
        how = {key: value for key, value in source.items() if key != "file"}
        sources.append(
            how
            | {"registry": "npm", "package": f"{name}-doc", "version": "1.0", "licence": "MIT"}
            | {"files": ["doc/*"]}
        )
    path = folder / "sources.json"
    path.write_text(json.dumps(sources))
    return path


@pytest.fixture
def small(data: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that builds the small packages in a folder and returns the manifest."""
    settings = data.corpus.Settings(
        pieces=400,
        valid_characters=4000,
        test_characters=6000,
        max_document_share=0.5,
        domain_tokens=1500,
        seed=1,
    )

    def build(folder: Path, *flags: str, **changes: Any) -> dict[str, Any]:
        monkeypatch.setattr(data.laptop, "SETTINGS", replace(settings, **changes))
        if not (folder / "sources.json").exists():
            make_packages(folder)
            (folder / "reference.json").write_text('{"sources": {}}')
        paths = ["--sources", str(folder / "sources.json")]
        paths += ["--reference", str(folder / "reference.json")]
        data.laptop.main(["--output", str(folder), *paths, *flags])
        return json.loads((folder / "manifest.json").read_text())

    return build


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def test_laptop_recipe(
    data: SimpleNamespace, small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    manifest = small(tmp_path)

    splits = manifest["splits"]
    assert list(splits) == ["train", "valid", "test", "domains/poems"]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    assert len(dictionary) == len(tokenizer) - 1 + 4
    for name, split in splits.items():
        text = lines(tmp_path / f"text/{name}.txt")
        domain = name.startswith("domains")
        prefix = tmp_path / name / "test" if domain else tmp_path / "bin" / name
        assert lines(prefix.parent / "dict.txt") == lines(tmp_path / "dict.txt")
        dataset = indexed_dataset.make_dataset(str(prefix), "mmap")
        decoded = [
            tokenizer.decode([dictionary[token] for token in dataset[i][:-1]])
            for i in range(len(dataset))
        ]
        assert decoded == text
        assert split["tokens"] == dataset.sizes.sum()
        assert split["paragraphs"] == len(text)
        assert split["bytes"] == (tmp_path / f"text/{name}.txt").stat().st_size
        assert split["bin_sha256"] == data.files.sha256(prefix.with_suffix(".bin"))
        if name == "train":
            counts = Counter(token for i in range(len(dataset)) for token in dataset[i].tolist())
            assert [counts[i] for i in range(4, len(dictionary))] == dictionary.count[4:]
    assert 1500 <= splits["domains/poems"]["tokens"] < 1600

    # A text that the package has twice is there once. A quoted poem is not in the domain's text.
    everything = [line for name in splits for line in lines(tmp_path / f"text/{name}.txt")]
    assert len(everything) == len(set(everything))
    assert manifest["documents"]["guide"]["copies"] == 1
    assert splits["domains/poems"]["paragraphs_overlapping"] == 1
    assert manifest["overlap_check"]["found"] == 0


def test_laptop_recipe_is_deterministic(
    small: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = small(tmp_path / "a", "--workers", "1")
    assert "since packages are others" in capsys.readouterr().out
    make_packages(tmp_path / "b")
    (tmp_path / "b" / "reference.json").write_text(json.dumps(first))
    for name in ("manual/manual.whl", "guide/guide.tgz", "poems/poems.tgz"):  # they contain dates
        source = tmp_path / "a" / "downloads" / name
        (tmp_path / "b" / "downloads" / name).write_bytes(source.read_bytes())
    assert small(tmp_path / "b", "--workers", "2") == first
    assert "the same corpus as in" in capsys.readouterr().out

    other = small(tmp_path / "b", seed=2)
    assert other["splits"]["test"]["text_sha256"] != first["splits"]["test"]["text_sha256"]
    assert "from the same packages: settings, splits" in capsys.readouterr().out


def test_interrupted_recipe_is_taken_up(
    data: SimpleNamespace,
    small: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.encode, "train_sentencepiece", interrupt)
        small(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert "== split\n" in capsys.readouterr().out
    manifest = small(tmp_path)
    done = re.findall(r"^== (.*)", capsys.readouterr().out, re.MULTILINE)
    assert done == ["encode", "check", "binarise"]

    assert small(tmp_path) == manifest
    assert "==" not in capsys.readouterr().out
    small(tmp_path, domain_tokens=500)
    done = re.findall(r"^== (.*)", capsys.readouterr().out, re.MULTILINE)
    assert done == ["split", "encode", "check", "binarise"]
    assert not [*tmp_path.rglob("*.tmp"), *tmp_path.rglob("*.partial")]


def test_interrupted_build_with_other_settings_leaves_nothing_behind(
    data: SimpleNamespace,
    small: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = small(tmp_path)
    model = data.files.sha256(tmp_path / "spm.model")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.encode, "dictionary_text", interrupt)
        small(tmp_path, seed=2)
    assert data.files.sha256(tmp_path / "spm.model") != model
    assert not (tmp_path / "manifest.json").exists()

    assert small(tmp_path) == first
    assert data.files.sha256(tmp_path / "spm.model") == model
    for name, split in first["splits"].items():
        assert data.files.sha256(tmp_path / f"text/{name}.txt") == split["text_sha256"]


def test_what_is_gone_is_made_again_and_so_is_what_depends_on_it(
    small: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = small(tmp_path)
    steps = ["deduplicate", "split", "encode", "check", "binarise"]
    for gone, first in (
        ("work/read/guide.jsonl", "deduplicate"),  # after two steps in a separate process
        ("work/distinct", "deduplicate"),
        ("work/split/poems.jsonl", "split"),
        ("spm.model", "encode"),
        ("text/domains/poems.txt", "encode"),
        ("bin", "binarise"),
        ("bin/valid.idx", "binarise"),
        ("domains/poems/dict.txt", "binarise"),
    ):
        path = tmp_path / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        capsys.readouterr()
        assert small(tmp_path) == manifest
        done = re.findall(r"^== (.*)", capsys.readouterr().out, re.MULTILINE)
        assert done == steps[steps.index(first) :]
        assert path.exists()


def test_recipe_fails_when_overlap_remains(
    data: SimpleNamespace,
    small: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data.splits, "remove_overlap", lambda documents, overlap: (documents, {}))
    with pytest.raises(SystemExit, match="train shares 13 words with what is held out"):
        small(tmp_path, domain_tokens=100_000)
    assert not (tmp_path / "manifest.json").exists()


def test_package_without_the_files_is_refused(
    small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    path = make_packages(tmp_path)
    path.write_text(path.read_text().replace("doc/*", "nowhere/*"))
    (tmp_path / "reference.json").write_text('{"sources": {}}')
    with pytest.raises(SystemExit, match=r"manual: manual\.whl has no documents at .*nowhere"):
        small(tmp_path, "--workers", "1")
