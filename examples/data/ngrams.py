"""Hashes word n-grams, the same on every machine, and finds text that two texts share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

WORD = re.compile(r"[^\W_]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bits are lost


class WordHashes(dict[str, int]):
    """Maps a word to 64 bits. A call maps a text to the hashes of its words in lower case."""

    @staticmethod
    def digest(text: str) -> bytes:
        return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()

    def __missing__(self, word: str) -> int:
        value = self[word] = int.from_bytes(self.digest(word), "little")
        return value

    def __call__(self, text: str) -> Hashes:
        return np.array([self[word] for word in WORD.findall(text.lower())], dtype=np.uint64)


def ngram_hashes(words: Hashes, n: int) -> Hashes:
    """Hash each n consecutive words. The result is empty if there are fewer."""
    count = max(len(words) - n + 1, 0)
    result = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        result = result * MULTIPLIER + words[offset : offset + count]
    return result


class Overlap:
    """Finds paragraphs that share a word n-gram with given texts."""

    def __init__(self, texts: Iterable[str], n: int) -> None:
        self.n = n
        self.words = WordHashes()
        hashes = [ngram_hashes(self.words(text), n) for text in texts]
        self.known = np.unique(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)

    def contains(self, paragraph: str) -> bool:
        """Return whether a paragraph has an n-gram of the texts. An n-gram may cross their
        paragraphs."""
        return self.common(paragraph) != ""

    def common(self, paragraph: str) -> str:
        """Return the first n words that a paragraph shares with the texts, in lower case; "" if
        none."""
        words = self.words(paragraph)
        if len(words) < self.n or not len(self.known):
            return ""
        hashes = ngram_hashes(words, self.n)
        places = np.searchsorted(self.known, hashes).clip(max=len(self.known) - 1)
        found = self.known[places] == hashes
        if not found.any():
            return ""
        start = int(found.argmax())
        return " ".join(WORD.findall(paragraph.lower())[start : start + self.n])
