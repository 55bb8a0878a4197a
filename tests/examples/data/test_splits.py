"""Splits, and the word sequences that they must not share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.examples.data.made import make_text


def make_documents(count: int, name: str = "document") -> list[tuple[str, str]]:
    return [(f"{name}{i}", make_text((name, i))) for i in range(count)]


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
