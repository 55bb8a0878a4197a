"""Splits text like GPT-2's encoder, in plain Python."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .splitter import Splitter


class GPT2(Splitter):
    """Splits text like GPT-2's encoder. A piece is a number, as in fairseq's dictionary.

    Args:
        settings: ``encoder`` (piece in GPT-2's alphabet of bytes -> number) and ``merges``.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import regex  # transformers requires it

        self.numbers: dict[str, int] = settings["encoder"]
        self.names = {str(number): name for name, number in self.numbers.items()}
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(settings["merges"])}
        self.letters = byte_letters()
        self.bytes = {letter: byte for byte, letter in self.letters.items()}
        self.words: Callable[[str], list[str]] = regex.compile(
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        ).findall
        self._remember()

    def split(self, line: str) -> list[str]:
        """Return the pieces of a line."""
        return [piece for word in self.words(line) for piece in self._split_word(word)]

    def begins_word(self, piece: str) -> bool:
        """Return whether no piece before this one changes how it and those behind it are split."""
        return self.names.get(piece, "").startswith(self.letters[ord(" ")])

    def has(self, piece: str) -> bool:
        """Return whether a piece is one of the encoder's."""
        return piece in self.names

    def split_again(self, pieces: Sequence[str]) -> list[str]:
        """Return the pieces of the text of a word's pieces.

        Raises:
            UnicodeDecodeError: the pieces are bytes that are no text.
        """
        return self.split(self._bytes_of(pieces).decode())

    def _split(self, word: str) -> list[str]:
        """Merge the pair of neighbours with the lowest rank, everywhere, until none has a rank."""
        parts = [self.letters[byte] for byte in word.encode("utf-8", errors="replace")]
        while len(parts) > 1:
            pairs = itertools.pairwise(parts)
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                size = 2 if tuple(parts[i : i + 2]) == best else 1
                merged.append("".join(parts[i : i + size]))
                i += size
            parts = merged
        return [str(self.numbers[part]) for part in parts]

    def join(self, pieces: Sequence[str], within_line: bool = False) -> str:
        """Return the text of a line's pieces. Pieces that are no numbers stay as they are."""
        return self._bytes_of(pieces).decode("utf-8", errors="replace")

    def _bytes_of(self, pieces: Sequence[str]) -> bytes:
        names = [(piece, self.names.get(piece)) for piece in pieces]
        return b"".join(
            piece.encode() if name is None else bytes(self.bytes[c] for c in name)
            for piece, name in names
        )


def byte_letters() -> dict[int, str]:
    """Return byte -> letter of GPT-2's alphabet, in which every byte is printable."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }
