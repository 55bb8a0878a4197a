"""Cleans the text of the readers: normal characters and white space, no lines without text."""

from __future__ import annotations

import itertools
import re
import textwrap
import unicodedata
from collections import Counter

MAX_LINE_LENGTH = 2000  # characters; longer paragraphs are cut at a space
MAX_WORD_LENGTH = 120  # characters; longer ones are data
MIN_LETTERS = 0.55  # share of characters that are not spaces; less is a table, a drawing or a dump
MIN_DOCUMENT_LENGTH = 200  # characters
LISTING = 12  # so many consecutive short paragraphs are a table of contents or an index
MAX_ENTRY_LENGTH = 60  # characters
MIN_PROSE = 0.3  # share of a document's characters in paragraphs that are longer than entries
EDGE = 4  # paragraphs at either end of a document, where page headers and footers are
BOILERPLATE_SHARE = 0.05  # of a source's documents; boilerplate is at an edge of more
BOILERPLATE_DOCUMENTS = 8

# Controls, formats (such as zero-width spaces), surrogates, private use, unassigned.
NO_CHARACTER = re.compile(
    "[^\\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\ufffd"
    "\ue000-\uf8ff\ufff0-\uffff]"
)
REPLACED = {ord("¶"): " ", ord("▁"): "_"}  # links to headings; SentencePiece's space
TWO_LETTERS = re.compile(r"[^\W\d_]{2}")
LEADERS = re.compile(r"([-=_*.~#+·•─━═│┃|])\1{3,}")  # rules, dotted lines


def normalise(text: str) -> str:
    """Normalise to NFC, with one space for any whitespace in a paragraph and no control
    characters."""
    text = NO_CHARACTER.sub(" ", unicodedata.normalize("NFC", text).translate(REPLACED))
    lines = (" ".join(LEADERS.sub(" ", line).split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def is_text(paragraph: str) -> bool:
    """Return whether a paragraph consists mostly of letters, in words."""
    letters = sum(map(str.isalpha, paragraph))
    spaces = paragraph.count(" ")
    return (
        letters >= MIN_LETTERS * (len(paragraph) - spaces)
        and TWO_LETTERS.search(paragraph) is not None
        and max(map(len, paragraph.split(" "))) <= MAX_WORD_LENGTH
    )


def is_entry(paragraph: str) -> bool:
    """Return whether a paragraph could be a line of a table of contents or of an index."""
    return len(paragraph) <= MAX_ENTRY_LENGTH and paragraph[-1] not in ".:;!?,)”\"'"


def without_listings(paragraphs: list[str]) -> list[str]:
    groups = ((entry, list(group)) for entry, group in itertools.groupby(paragraphs, is_entry))
    return [p for entry, group in groups if not entry or len(group) < LISTING for p in group]


def is_prose(paragraphs: list[str]) -> bool:
    long = sum(len(p) for p in paragraphs if len(p) > MAX_ENTRY_LENGTH)
    return long >= MIN_PROSE * sum(map(len, paragraphs))


def edge_key(paragraph: str) -> str:
    return re.sub(r"\d+", "0", paragraph)


def edges(paragraphs: list[str]) -> list[str]:
    """Return the paragraphs at both ends, each once."""
    if len(paragraphs) <= 2 * EDGE:
        return paragraphs
    return paragraphs[:EDGE] + paragraphs[-EDGE:]


def boilerplate(documents: list[list[str]]) -> set[str]:
    """Return paragraphs that many documents have at an edge."""
    counts = Counter(key for d in documents for key in {edge_key(p) for p in edges(d)})
    least = max(BOILERPLATE_DOCUMENTS, BOILERPLATE_SHARE * len(documents))
    return {key for key, count in counts.items() if count >= least}


def clean_documents(
    documents: list[tuple[str, str]], listings: bool
) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Clean the documents of one source.

    Args:
        documents: names and texts.
        listings: whether to keep rows of short paragraphs, such as verses and definitions.

    Returns:
        The documents that have text left, and counts of what was dropped, by reason.
    """
    split = [(name, normalise(text).split("\n")) for name, text in documents]
    repeated = boilerplate([paragraphs for _, paragraphs in split])
    reasons = ("paragraphs_boilerplate", "paragraphs_no_text", "paragraphs_listing")
    dropped = dict.fromkeys([*reasons, "short", "no_prose"], 0)
    kept = []
    for name, paragraphs in split:
        inner = [
            p
            for i, p in enumerate(paragraphs)
            if EDGE <= i < len(paragraphs) - EDGE or edge_key(p) not in repeated
        ]
        text = [p for p in inner if is_text(p)]
        listed = text if listings else without_listings(text)
        dropped["paragraphs_boilerplate"] += len(paragraphs) - len(inner)
        dropped["paragraphs_no_text"] += len(inner) - len(text)
        dropped["paragraphs_listing"] += len(text) - len(listed)
        if sum(map(len, listed)) < MIN_DOCUMENT_LENGTH:
            dropped["short"] += 1
        elif not (listings or is_prose(listed)):
            dropped["no_prose"] += 1
        else:
            kept.append((name, "\n".join(line for p in listed for line in cut(p))))
    return kept, dropped


def cut(paragraph: str) -> list[str]:
    if len(paragraph) <= MAX_LINE_LENGTH:
        return [paragraph]
    return textwrap.wrap(paragraph, MAX_LINE_LENGTH, break_on_hyphens=False, break_long_words=False)
