"""Tokenizers in plain Python, whose token ids are those of fairseq's dictionary.

They split text as SentencePiece's BPE models and GPT-2's encoder do, and look the pieces up as
fairseq does:

- A line break is ``</s>``, which ``fairseq-preprocess`` puts at the end of each line.
- Pieces that ``dict.txt`` does not have are ``<unk>``.
"""

from __future__ import annotations

import array
import base64
import functools
import heapq
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

SPACE = "\u2581"
"""SentencePiece's mark of a space."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""Piece of a byte that no other piece covers."""
CACHED_WORDS = 2**16
"""Number of words whose pieces are remembered."""


class Text:
    """Converts text to pieces, pieces to token ids, and back.

    Args:
        settings: see :mod:`.tokenizer_files`.

    Attributes:
        ids: piece -> token id, for the pieces in the dictionary, the special ones included.
        pieces: token id -> piece.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.ids: dict[str, int] = dict(settings["ids"])
        self.pieces = {number: piece for piece, number in self.ids.items()}
        self.specials: dict[str, str] = settings["specials"]
        self.splitter = SPLITTERS[settings["kind"]](settings)

    def tokenize(self, text: str) -> list[str]:
        """Return the pieces of a text. A line break is the end of a sentence."""
        result: list[str] = []
        for i, line in enumerate(text.split("\n")):
            if i > 0:
                result.append(self.specials["eos"])
            # fairseq joins the pieces by spaces, and splits at any white space.
            result += " ".join(self.splitter.split(line)).split()
        return result

    def id_of(self, piece: str) -> int:
        """Return the token id of a piece."""
        number = self.ids.get(piece)
        return self.ids[self.specials["unk"]] if number is None else number

    def join(self, pieces: Sequence[str]) -> str:
        """Return the text of pieces."""
        lines: list[list[str]] = [[]]
        for piece in pieces:
            if piece == self.specials["eos"]:
                lines.append([])
            elif piece not in (self.specials["bos"], self.specials["pad"]):
                lines[-1].append(piece)
        return "\n".join(map(self.splitter.join, lines))


# SentencePiece


class Splitter:
    """Splits words, and remembers the pieces of some. Copies and pickles remember none."""

    def _split(self, word: str) -> list[str]:
        raise NotImplementedError

    def _remember(self) -> None:
        self._split_word = functools.lru_cache(CACHED_WORDS)(self._split)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_split_word"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()


class SentencePiece(Splitter):
    """Splits text like a BPE model of SentencePiece (``bpe_model.cc``, ``normalizer.cc``).

    Args:
        settings: ``scores`` (piece -> score), ``user_defined`` (pieces that are never split),
            ``byte_fallback``, ``unknown`` (the text of unknown pieces is kept), and the options of
            the normalizer.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.scores: dict[str, float] = settings["scores"]
        self.byte_fallback: bool = settings["byte_fallback"]
        self.normalizer = Normalizer(settings)
        self.user_defined = set(settings["user_defined"])
        self.longest = max(map(len, self.user_defined), default=0)
        # Merges never cross the beginning of a word, if no piece does.
        suffix = settings["whitespace_as_suffix"]
        self.by_word = not suffix and not any(SPACE in piece[1:] for piece in self.scores)
        self._remember()

    def split(self, line: str) -> list[str]:
        """Return the pieces of a line. A run of characters without pieces is one piece."""
        text = self.normalizer.normalize(line)
        words = re.findall(f"{SPACE}?[^{SPACE}]+|{SPACE}", text) if self.by_word else [text]
        result: list[str] = []
        unknown = False  # whether the last piece is not in the vocabulary
        for word in words if text else []:
            for piece in self._split_word(word):
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

    def join(self, pieces: Sequence[str]) -> str:
        """Return the text of a line's pieces. Bytes that are not UTF-8 become U+FFFD."""
        data = b"".join(
            bytes([int(match[1], 16)]) if (match := BYTE.fullmatch(piece)) else piece.encode()
            for piece in pieces
        )
        return data.decode("utf-8", errors="replace").replace(SPACE, " ").strip()


class Normalizer:
    """Normalizes a line like SentencePiece.

    Args:
        settings: ``charsmap`` (base64 of the model's rules, or empty), and ``dummy_prefix``,
            ``remove_extra_whitespaces``, ``whitespace_as_suffix`` and ``user_defined``.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.rules = CharsMap(base64.b64decode(settings["charsmap"]))
        self.dummy_prefix: bool = settings["dummy_prefix"]
        self.tidy: bool = settings["remove_extra_whitespaces"]
        self.suffix: bool = settings["whitespace_as_suffix"]
        self.user_defined = sorted(settings["user_defined"], key=len, reverse=True)

    def normalize(self, line: str) -> str:
        """Return a line with its spaces marked."""
        parts = list(self._parts(line))
        if self.tidy:
            while parts and parts[0] == " ":
                del parts[0]
        if not parts:
            return ""
        text = SPACE if self.dummy_prefix and not self.suffix else ""
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
        return text + SPACE if self.dummy_prefix and self.suffix else text

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


# GPT-2


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

    def join(self, pieces: Sequence[str]) -> str:
        """Return the text of a line's pieces. Pieces that are no numbers stay as they are."""
        data = bytearray()
        for piece in pieces:
            name = self.names.get(piece)
            data += piece.encode() if name is None else bytes(self.bytes[c] for c in name)
        return data.decode("utf-8", errors="replace")


def byte_letters() -> dict[int, str]:
    """Return byte -> letter of GPT-2's alphabet, in which every byte is printable."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


SPLITTERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "sentencepiece": SentencePiece,
    "gpt2": GPT2,
}
"""Kind of a tokenizer -> class."""
