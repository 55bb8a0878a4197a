"""Texts of every format that a package has."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest

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


def read(data: SimpleNamespace, reader: str, contents: bytes | str, **options: str) -> list[str]:
    contents = contents.encode() if isinstance(contents, str) else contents
    return [text for _, text in data.readers.read_file(reader, options, "file", contents)]


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
