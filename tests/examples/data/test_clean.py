"""Which characters and paragraphs of a document are kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.examples.data.made import WORDS, make_text


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
