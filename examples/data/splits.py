"""Deals whole documents to train, valid and test, and removes training text from the others."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from ngrams import Overlap

OVERLAP_NGRAM = 13  # words
MAX_DOMAIN_SHARE = 0.1  # largest share of a domain's tokens that one document may have

Documents = list[tuple[str, str]]


def size(text: str) -> int:
    """Return the number of characters, with an end of line for each line."""
    return len(text) + 1


def shuffled(documents: Documents, seed: int) -> list[int]:
    """Return the indices of the documents, in an order that depends on their names and the seed
    only."""
    rng = random.Random(seed)
    order = sorted(range(len(documents)), key=lambda i: documents[i][0])
    rng.shuffle(order)
    return order


def split_documents(
    documents: Documents, sizes: dict[str, int], max_share: float, seed: int
) -> dict[str, Documents]:
    """Draw documents for each held-out split until it has `sizes[split]` characters.

    The rest stays in train. So do documents with more than `max_share` of the characters, as a few
    of them would dominate a held-out split. Within a split the documents keep their order.
    """
    order = iter(shuffled(documents, seed))
    chosen: dict[str, list[int]] = {"train": []}
    for split, wanted in sizes.items():
        chosen[split] = []
        have = 0
        while have < wanted and (index := next(order, None)) is not None:
            length = size(documents[index][1])
            if length > max_share * wanted:
                chosen["train"].append(index)
            else:
                chosen[split].append(index)
                have += length
    chosen["train"] += order
    for split, places in chosen.items():
        if not places:
            reason = f"no document for {split} among {len(documents)}: there are too few"
            if split in sizes:
                reason += (
                    f", or those left are longer than {max_share:.0%} of the {sizes[split]:,} "
                    "characters that it is to have"
                )
            raise ValueError(reason)
    return {split: [documents[i] for i in sorted(places)] for split, places in chosen.items()}


def remove_overlap(documents: Documents, overlap: Overlap) -> tuple[Documents, dict[str, int]]:
    """Remove the paragraphs that share a word n-gram with the texts of `overlap`."""
    kept = []
    dropped = {"documents_overlapping": 0, "paragraphs_overlapping": 0, "characters_overlapping": 0}
    for name, text in documents:
        paragraphs = text.split("\n")
        rest = [p for p in paragraphs if not overlap.contains(p)]
        dropped["paragraphs_overlapping"] += len(paragraphs) - len(rest)
        dropped["characters_overlapping"] += size(text) - sum(map(size, rest))
        if rest:
            kept.append((name, "\n".join(rest)))
        else:
            dropped["documents_overlapping"] += 1
    return kept, dropped


def check_no_overlap(train: Iterable[str], held_out: Mapping[str, Iterable[str]], n: int) -> int:
    """Check the finished texts. In contrast to :func:`remove_overlap`, it searches train for the
    n-grams of held-out paragraphs.

    Returns:
        The number of paragraphs that were checked.

    Raises:
        ValueError: a held-out paragraph overlaps with train.
    """
    looked_at = 0
    lines = [(name, line) for name, texts in held_out.items() for line in texts]
    known = Overlap((line for _, line in lines), n)
    for line in train:
        looked_at += 1
        if known.contains(line):
            raise ValueError(f"train shares {n} words with what is held out: {line[:200]}")
    return looked_at


def cut_documents(
    documents: Documents, tokens: dict[str, list[int]], wanted: int, seed: int
) -> Documents:
    """Draw documents until they have `wanted` tokens. Documents that are too long are cut at a
    paragraph.

    Args:
        tokens: for each document, the number of tokens of each paragraph.
    """
    have = 0
    chosen: dict[int, str] = {}
    for index in shuffled(documents, seed):
        name, text = documents[index]
        end = have + min(wanted - have, round(MAX_DOMAIN_SHARE * wanted))
        paragraphs = []
        for paragraph, count in zip(text.split("\n"), tokens[name], strict=True):
            if have >= end:
                break
            paragraphs.append(paragraph)
            have += count
        if paragraphs:
            chosen[index] = "\n".join(paragraphs)
    return [(documents[i][0], chosen[i]) for i in sorted(chosen)]
