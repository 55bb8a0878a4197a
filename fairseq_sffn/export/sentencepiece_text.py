"""Splits text like SentencePiece's models, BPE and unigram, in plain Python."""

from __future__ import annotations

import array
import base64
import heapq
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .splitter import Splitter

SPACE = "\u2581"
"""SentencePiece's mark of a space."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""Piece of a byte that no other piece covers."""
UNKNOWN_PENALTY = 10.0
"""Lowest score of a unigram model, minus the score of an unknown character."""


class SentencePiece(Splitter):
    """Splits text like a BPE model of SentencePiece (``bpe_model.cc``, ``normalizer.cc``).

    Args:
        settings: ``scores`` (piece -> score), ``user_defined`` (pieces that are never split),
            ``byte_fallback``, and the options of the normalizer.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.scores: dict[str, float] = settings["scores"]
        self.byte_fallback: bool = settings["byte_fallback"]
        self.normalizer = Normalizer(settings)
        self.user_defined = set(settings["user_defined"])
        self.longest = max(map(len, self.user_defined), default=0)
        # Merges never cross the beginning of a word, if no piece does.
        suffix = settings["whitespace_as_suffix"]
        self.space_begins_word = not suffix and not any(SPACE in p[1:] for p in self.scores)
        self.by_word = self.space_begins_word
        self._remember()

    def split(self, line: str) -> list[str]:
        """Return the pieces of a line. A run of characters without pieces is one piece."""
        return self._split_normalized(self.normalizer.normalize(line))

    def begins_word(self, piece: str) -> bool:
        """Return whether no piece before this one changes how it and those behind it are split."""
        return self.space_begins_word and piece.startswith(SPACE)

    def has(self, piece: str) -> bool:
        """Return whether a piece is one of the model's."""
        is_byte = self.byte_fallback and BYTE.fullmatch(piece) is not None
        return piece in self.scores or piece in self.user_defined or is_byte

    def split_again(self, pieces: Sequence[str]) -> list[str]:
        """Return the pieces of the text of a word's pieces.

        Raises:
            UnicodeDecodeError: the pieces are bytes that are no text.
        """
        text = b"".join(map(self._bytes_of, pieces)).decode()
        return self._split_normalized(text.replace(" ", SPACE))

    def _split_normalized(self, text: str) -> list[str]:
        words, split = [text], self._split
        if self.by_word:
            words, split = re.findall(f"{SPACE}?[^{SPACE}]+|{SPACE}", text), self._split_word
        result: list[str] = []
        unknown = False  # whether the last piece is not in the vocabulary
        for word in words if text else []:
            for piece in split(word):
                if piece in self.scores or piece in self.user_defined:
                    unknown = False
                    result.append(piece)
                elif self.byte_fallback:
                    result += [f"<0x{byte:02X}>" for byte in piece.encode()]
                elif unknown:
                    result[-1] += piece
                else:
                    unknown = True
                    result.append(piece)
        return result

    def _split(self, word: str) -> list[str]:
        """Merge the pair of neighbours with the highest score, the leftmost of equal ones."""
        symbols = list(self._symbols(word))
        before, after = list(range(-1, len(symbols) - 1)), list(range(1, len(symbols) + 1))
        pairs: list[tuple[float, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left < 0 or right >= len(symbols):
                return
            if symbols[left] in self.user_defined or symbols[right] in self.user_defined:
                return
            merged = symbols[left] + symbols[right]
            if (score := self.scores.get(merged)) is not None:
                heapq.heappush(pairs, (-score, left, right, len(merged)))

        for left in range(len(symbols) - 1):
            consider(left, left + 1)
        while pairs:
            _, left, right, size = heapq.heappop(pairs)
            if not symbols[left] or not symbols[right]:
                continue
            if len(symbols[left]) + len(symbols[right]) != size:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[right] < len(symbols):
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [symbol for symbol in symbols if symbol]

    def _symbols(self, word: str) -> Iterator[str]:
        """Yield characters, and pieces that are never split."""
        start = 0
        while start < len(word):
            for size in range(min(self.longest, len(word) - start), 0, -1):
                if word[start : start + size] in self.user_defined:
                    break
            else:
                size = 1
            yield word[start : start + size]
            start += size

    def join(self, pieces: Sequence[str], within_line: bool = False) -> str:
        """Return the text of a line's pieces. Bytes that are not UTF-8 become U+FFFD.

        Spaces that the normalizer added to the line are left out.

        Args:
            pieces: pieces of a line.
            within_line: whether they begin inside of the line, so that the first space stays.
        """
        pieces, normalizer = list(pieces), self.normalizer
        if not within_line and normalizer.tidy:
            while pieces and pieces[0] == SPACE:
                del pieces[0]
        if not within_line and pieces and (normalizer.tidy or normalizer.adds_prefix):
            pieces[0] = pieces[0].removeprefix(SPACE)
        if pieces and normalizer.adds_suffix:
            pieces[-1] = pieces[-1].removesuffix(SPACE)
        data = b"".join(map(self._bytes_of, pieces))
        return data.decode("utf-8", errors="replace")

    def _bytes_of(self, piece: str) -> bytes:
        if self.byte_fallback and (match := BYTE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace(SPACE, " ").encode()


class Unigram(SentencePiece):
    """Splits text like a unigram model of SentencePiece (``EncodeOptimized``).

    The pieces of a line are those with the highest sum of scores. Of equal sums, the one whose last
    piece is longest wins. Sums are rounded to single precision, as in SentencePiece.

    Args:
        settings: see :class:`SentencePiece`. No piece may be user-defined.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.by_word = False  # sums are those of the whole line
        self.widest = max(map(len, self.scores), default=0)
        self.unknown_score = min(self.scores.values(), default=0.0) - UNKNOWN_PENALTY

    def _split(self, word: str) -> list[str]:
        """Find the best path over the characters, of which an unknown one is a piece."""
        sums: list[float] = [0.0] + [-math.inf] * len(word)
        starts = [0] * (len(word) + 1)

        def consider(start: int, end: int, score: float) -> None:
            if (total := rounded(sums[start] + score)) > sums[end]:
                sums[end], starts[end] = total, start

        for start in range(len(word)):
            known = False
            for end in range(start + 1, min(start + self.widest, len(word)) + 1):
                if (score := self.scores.get(word[start:end])) is not None:
                    consider(start, end, score)
                    known |= end == start + 1
            if not known:
                consider(start, start + 1, self.unknown_score)
        pieces, end = [], len(word)
        while end:
            pieces.append(word[starts[end] : end])
            end = starts[end]
        return pieces[::-1]


def rounded(value: float) -> float:
    """Return a number in single precision."""
    result: float = struct.unpack("f", struct.pack("f", value))[0]
    return result


class Normalizer:
    """Normalizes a line like SentencePiece.

    Args:
        settings: ``charsmap`` (base64 of the model's rules, or empty), and ``dummy_prefix``,
            ``remove_extra_whitespaces``, ``whitespace_as_suffix`` and ``user_defined``.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.rules = CharsMap(base64.b64decode(settings["charsmap"]))
        dummy: bool = settings["dummy_prefix"]
        self.tidy: bool = settings["remove_extra_whitespaces"]
        suffix: bool = settings["whitespace_as_suffix"]
        self.adds_prefix = dummy and not suffix
        self.adds_suffix = dummy and suffix
        self.user_defined = sorted(settings["user_defined"], key=len, reverse=True)

    def normalize(self, line: str) -> str:
        """Return a line with its spaces marked."""
        parts = list(self._parts(line))
        if self.tidy:
            while parts and parts[0] == " ":
                del parts[0]
        if not parts:
            return ""
        text = SPACE if self.adds_prefix else ""
        after_space = self.tidy
        for part in parts:
            if after_space:
                part = part.lstrip(" ")
            if part:
                text += part.replace(" ", SPACE)
                after_space = part.endswith(" ")
            if not self.tidy:
                after_space = False
        if self.tidy:
            text = text.rstrip(SPACE)
        return text + SPACE if self.adds_suffix else text

    def _parts(self, line: str) -> Iterator[str]:
        """Yield the replacement of each prefix that a rule covers, and other characters."""
        # A lone surrogate has no UTF-8.
        line = line.encode("utf-8", errors="replace").decode()
        start = 0
        while start < len(line):
            found = next((w for w in self.user_defined if line.startswith(w, start)), None)
            if found is not None:
                yield found
                start += len(found)
                continue
            size, replacement = self.rules.longest(line, start)
            yield replacement if size else line[start]
            start += size or 1


class CharsMap:
    """Rules from prefixes to replacements: a double-array trie, then the replacements.

    Args:
        data: ``precompiled_charsmap`` of a SentencePiece model; empty: no rules.
    """

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:4], "little")
        self.units = array.array("I", data[4 : 4 + size]) if size else None
        self.replacements = data[4 + size :]

    def longest(self, line: str, start: int) -> tuple[int, str]:
        """Return the number of characters of the longest prefix with a rule, and its replacement.

        Args:
            line: the text.
            start: index of the first character.
        """
        if self.units is None:
            return 0, ""
        units, size, found = self.units, 0, None
        node = self._offset(units[0])
        for i in range(start, len(line)):
            for byte in line[i].encode():
                node ^= byte
                if node >= len(units) or units[node] & 0x800000FF != byte:
                    return size, self._replacement(found)
                unit = units[node]
                node ^= self._offset(unit)
            if unit >> 8 & 1:  # a rule ends here
                size, found = i - start + 1, units[node] & 0x7FFFFFFF
        return size, self._replacement(found)

    @staticmethod
    def _offset(unit: int) -> int:
        return (unit >> 10) << ((unit & 1 << 9) >> 6)

    def _replacement(self, begin: int | None) -> str:
        if begin is None:
            return ""
        return self.replacements[begin : self.replacements.index(b"\0", begin)].decode()
