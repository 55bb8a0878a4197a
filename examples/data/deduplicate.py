"""Drops near-copies of documents and repeated paragraphs from a whole collection."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from ngrams import WordHashes, ngram_hashes

MIN_PARAGRAPH_LENGTH = 40  # characters; shorter ones, such as headings, may repeat
SHINGLE = 8  # words
SHINGLE_SAMPLE = 8  # one shingle of so many is compared
MAX_SEEN = 0.5  # share of a document's shingles; a copy has more in earlier documents


def paragraph_key(paragraph: str) -> str:
    return re.sub(r"\W+", " ", paragraph.lower()).strip()


class Deduplicator:
    """Keeps the first of all documents and paragraphs that are nearly the same."""

    def __init__(self) -> None:
        self.words = WordHashes()
        self.shingles: set[int] = set()
        self.paragraphs: set[bytes] = set()

    def is_copy(self, text: str) -> bool:
        """Return whether earlier documents have most of a document. Remember it if not."""
        hashes = np.unique(ngram_hashes(self.words(text), SHINGLE))
        sample = set(hashes[hashes % SHINGLE_SAMPLE == 0].tolist())
        copy = len(sample & self.shingles) > MAX_SEEN * len(sample)
        if not copy:
            self.shingles |= sample
        return copy

    def new_paragraphs(self, text: str) -> Iterator[str]:
        for paragraph in text.split("\n"):
            if len(paragraph) >= MIN_PARAGRAPH_LENGTH:
                key = self.words.digest(paragraph_key(paragraph))
                if key in self.paragraphs:
                    continue
                self.paragraphs.add(key)
            yield paragraph

    def documents(
        self, documents: list[tuple[str, str]], min_length: int
    ) -> tuple[list[tuple[str, str]], dict[str, int]]:
        """Return the new documents of one source, and counts of what was dropped."""
        dropped = {"copies": 0, "short_without_copied_paragraphs": 0, "paragraphs_copied": 0}
        kept = []
        for name, text in documents:
            if self.is_copy(text):
                dropped["copies"] += 1
                continue
            paragraphs = list(self.new_paragraphs(text))
            dropped["paragraphs_copied"] += text.count("\n") + 1 - len(paragraphs)
            if sum(map(len, paragraphs)) < min_length:
                dropped["short_without_copied_paragraphs"] += 1
            else:
                kept.append((name, "\n".join(paragraphs)))
        return kept, dropped
