"""Turns the files of a package into documents: an id and paragraphs separated by newlines.

A reader takes the name and the bytes of one file and yields its documents. Cleaning comes later.
"""

from __future__ import annotations

import ast
import bz2
import functools
import gzip
import json
import lzma
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from xml.etree import ElementTree

from lxml import etree, html

Document = tuple[str, str]
Reader = Callable[..., Iterable[Document]]

RECORDS_PER_DOCUMENT = 50  # for collections of short records, such as the glosses of a dictionary
MIN_FIELD_LENGTH = 40  # characters


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Elements with the text of a page, most specific first.
HTML_ROOTS = (
    '//*[@role="main"]',
    "//main",
    '//*[@id="page-content"]',
    '//*[@id="content"]',
    '//*[@class="main"]',
    "//body",
)
HTML_BLOCKS = words(
    """address article aside blockquote body br caption center dd details div dl dt fieldset
    figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr li main nav ol p pre section
    summary table tbody tfoot thead tr ul"""
)
HTML_CELLS = words("td th")
HTML_SKIPPED_TAGS = words(
    """aside button footer form head iframe math nav noscript object script select style svg"""
)
# Classes and ids of navigation and of generated lists.
HTML_SKIPPED = words(
    """author_footer book-navigation bottomlang breadcrumb caption-line comments_section contents
    copyright-footer docnav footer headerlink index instances langlist leftnav linenos linkbar
    mini-panel navfooter navheader navsetbottom navsettop out-of-date package-header page-links
    prev-next-area prev-next-bottom quickview refpara related rst-footer-buttons selflink
    sphinxsidebar spirit-nav synopsis table-of-contents toc toctree-wrapper tocset tocview
    topsection versions viewcode-link"""
)
HTML_ONE_PARAGRAPH = words("RktBlk highlighttable")  # code that is formatted as a table

WIKI_END = re.compile(
    r"^==\s*(References|Notes|External links|See also|Further reading|Bibliography|Sources|"
    r"Footnotes|Citations|Gallery|Notes and references)\s*==\s*$",
    re.MULTILINE | re.IGNORECASE,
)
WIKI_NAMESPACE = "{http://www.mediawiki.org/xml/export-0.10/}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def blank_line_paragraphs(text: str) -> str:
    """Join the lines of each paragraph of a text in which empty lines separate paragraphs."""
    return "\n".join(one_line(p) for p in re.split(r"\n\s*\n", text) if p.strip())


def records(name: str, lines: Iterable[str]) -> Iterator[Document]:
    """Group consecutive records into documents, a record per paragraph."""
    paragraphs = [line for line in map(one_line, lines) if line]
    for start in range(0, len(paragraphs), RECORDS_PER_DOCUMENT):
        chunk = paragraphs[start : start + RECORDS_PER_DOCUMENT]
        yield f"{name}#{start // RECORDS_PER_DOCUMENT}", "\n".join(chunk)


def is_skipped(element: etree._Element) -> bool:
    names = f"{element.get('class') or ''} {element.get('id') or ''}".split()
    return (
        element.tag in HTML_SKIPPED_TAGS
        or (element.tag == "a" and "link" in names)  # to the source code
        or not HTML_SKIPPED.isdisjoint(names)
        or any(name.startswith("book-navigation") for name in names)
    )


def html_paragraphs(root: etree._Element) -> Iterator[str]:
    """Yield the text of each block. A block of code or a row of a table is one paragraph."""
    parts: list[str] = []

    def flush() -> Iterator[str]:
        line = one_line("".join(parts))
        parts.clear()
        if line:
            yield line

    walk = etree.iterwalk(root, events=("start", "end", "comment", "pi"))
    for event, element in walk:
        tag = element.tag
        if event == "start":
            if is_skipped(element):
                walk.skip_subtree()
                continue
            if tag in HTML_BLOCKS:
                yield from flush()
            elif tag in HTML_CELLS:
                parts.append(" ")
            classes = (element.get("class") or "").split()
            if "classifier" in classes:  # the type of a parameter, after its name
                parts.append(" : ")
            if tag == "pre" or not HTML_ONE_PARAGRAPH.isdisjoint(classes):
                for row in element.iter("tr", "br"):
                    row.tail = " " + (row.tail or "")
                parts.append("".join(element.itertext()))
                walk.skip_subtree()
            elif element.text:
                parts.append(element.text)
            continue
        if event == "end" and tag in HTML_BLOCKS:
            yield from flush()
        if element is not root and element.tail:
            parts.append(element.tail)
    yield from flush()


def read_html(name: str, data: bytes) -> Iterator[Document]:
    declared = re.search(rb"charset=[\"']?([\w-]+)", data[:2000])
    parser = html.HTMLParser(encoding=declared[1].decode() if declared else "utf-8")
    try:
        page = html.document_fromstring(data, parser=parser)
    except (etree.ParserError, LookupError):  # an empty page, or an unknown encoding
        return
    if not (page.get("lang") or "en").startswith("en"):
        return
    roots = (found[0] for path in HTML_ROOTS if (found := page.xpath(path)))
    if (root := next(roots, None)) is None:  # a page of frames
        return
    yield name, "\n".join(html_paragraphs(root))


def read_text(name: str, data: bytes, document_start: str = "") -> Iterator[Document]:
    """Yield one document, or several, which begin where a pattern matches."""
    text = data.decode("utf-8", errors="replace")
    if not document_start:
        yield name, blank_line_paragraphs(text)
        return
    for i, part in enumerate(re.split(f"(?={document_start})", text, flags=re.MULTILINE)):
        yield f"{name}#{i}", blank_line_paragraphs(part)


def read_addresses(name: str, data: bytes) -> Iterator[Document]:
    """Read an xz-compressed file in which a line `== name` starts each document."""
    text = lzma.decompress(data).decode("utf-8")
    for document in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        title, body = document.split("\n", 1)
        yield title, "\n".join(one_line(line) for line in body.splitlines())


def read_wordnet(name: str, data: bytes) -> Iterator[Document]:
    """Yield the words and the gloss of each synset."""

    def glosses() -> Iterator[str]:
        for line in data.decode("utf-8", errors="replace").splitlines():
            fields, bar, gloss = line.partition(" | ")
            if line.startswith(" ") or not bar:
                continue
            columns = fields.split()
            words = columns[4 : 4 + 2 * int(columns[3], 16) : 2]
            yield f"{', '.join(words).replace('_', ' ')}: {gloss}"

    yield from records(name, glosses())


def read_fortunes(name: str, data: bytes) -> Iterator[Document]:
    yield from records(name, re.split(r"^%\n", data.decode("utf-8"), flags=re.MULTILINE))


def read_sqlite(name: str, data: bytes, query: str) -> Iterator[Document]:
    """Yield the rows of a query as records, their columns joined by colons."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        connection = sqlite3.connect(file.name)
        rows = connection.execute(query).fetchall()
        connection.close()
    yield from records(name, (": ".join(row) for row in rows))


def read_factbook(name: str, data: bytes) -> Iterator[Document]:
    """Yield `field: text` for the fields of a country that have more than a number or a name."""

    def fields(title: str, value: Any) -> Iterator[str]:
        if isinstance(value, str):
            parts = map(one_line, value.split("++"))
            yield from (f"{title}: {part}" for part in parts if len(part) >= MIN_FIELD_LENGTH)
            return
        if not isinstance(value, dict):  # a number
            return
        for key, inner in value.items():
            yield from fields(title if key == "text" else key, inner)

    yield name, "\n".join(fields("", json.loads(data)))


def read_quran(name: str, data: bytes) -> Iterator[Document]:
    chapter = json.loads(data)
    verses = (verse["translation"] for verse in chapter["verses"])
    yield name, "\n".join(map(one_line, [chapter["translation"], *verses]))


def read_licence(name: str, data: bytes) -> Iterator[Document]:
    """Yield the text after the YAML description, for licences in English."""
    _, description, text = re.split(r"^---$", data.decode("utf-8"), maxsplit=2, flags=re.MULTILINE)
    if not re.search(r"^language: (?!en)", description, re.MULTILINE):
        yield name, blank_line_paragraphs(text)


def read_dictd(name: str, data: bytes) -> Iterator[Document]:
    """Yield the paragraphs of a dictionary in dictd's format, without its own description."""
    paragraphs = blank_line_paragraphs(data.decode("utf-8")).split("\n")
    yield from records(name, (p for p in paragraphs if not p.startswith("00-database")))


def is_docstring(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def read_python(name: str, data: bytes) -> Iterator[Document]:
    """Yield a program without comments and docstrings, a function per paragraph."""
    tree = ast.parse(data)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [s for s in node.body if not is_docstring(s)] or [ast.Pass()]
    yield name, blank_line_paragraphs(ast.unparse(tree))


def remove_nested(text: str, start: str, end: str) -> str:
    """Remove the text between start and end, which may be nested."""
    pieces = re.split(f"({re.escape(start)}|{re.escape(end)})", text)
    depth, kept = 0, []
    for piece in pieces:
        if piece == start:
            depth += 1
        elif piece == end:
            depth = max(depth - 1, 0)
        elif depth == 0:
            kept.append(piece)
    return "".join(kept)


def plain_wikitext(text: str) -> str:
    """Return the prose of an article without templates, tables, references, media and markup."""
    if end := WIKI_END.search(text):
        text = text[: end.start()]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<ref[^>]*/>|<(ref|math|gallery|timeline)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = remove_nested(remove_nested(text, "{{", "}}"), "{|", "|}")
    text = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>|'{2,}|^=+|=+\s*$|^[*#:;]+", "", text, flags=re.MULTILINE)
    text = text.replace("&nbsp;", " ").replace("&ndash;", "\u2013")
    text = re.sub(r" ?\([\s;,]*\)", "", text)  # where a template was
    return "\n".join(one_line(line) for line in text.splitlines() if line.strip())


def read_wikipedia(name: str, data: bytes) -> Iterator[Document]:
    """Yield the articles of a dump, which may be cut off, without redirects."""
    parser: Any = ElementTree.XMLPullParser(events=["end"])
    parser.feed(bz2.decompress(data))
    for _, page in parser.read_events():
        if page.tag != f"{WIKI_NAMESPACE}page":
            continue
        text = page.findtext(f"{WIKI_NAMESPACE}revision/{WIKI_NAMESPACE}text") or ""
        article = page.findtext(f"{WIKI_NAMESPACE}ns") == "0"
        if article and not text.upper().startswith("#REDIRECT"):
            yield page.findtext(f"{WIKI_NAMESPACE}title") or "", plain_wikitext(text)


READERS: dict[str, Reader] = {
    "html": read_html,
    "text": read_text,
    "addresses": read_addresses,
    "wordnet": read_wordnet,
    "fortunes": read_fortunes,
    "sqlite": read_sqlite,
    "factbook": read_factbook,
    "quran": read_quran,
    "licence": read_licence,
    "dictd": read_dictd,
    "python": read_python,
    "wikipedia": read_wikipedia,
}


def read_file(reader: str, options: dict, name: str, data: bytes) -> Iterator[Document]:
    """Yield the documents of one file. A file that ends in .gz or .dz is unpacked first."""
    if name.endswith((".gz", ".dz")):
        name, data = name[:-3], gzip.decompress(data)
    yield from functools.partial(READERS[reader], **options)(name, data)
