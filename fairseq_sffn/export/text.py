"""Tokenizers in plain Python, whose token ids are those of fairseq's dictionary.

They split text as SentencePiece's models (BPE and unigram) and GPT-2's encoder do, and look the
pieces up as fairseq does:

- A line break is ``</s>``, which ``fairseq-preprocess`` puts at the end of each line.
- Pieces that ``dict.txt`` does not have are ``<unk>``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .gpt2_text import GPT2
from .sentencepiece_text import SentencePiece, Unigram

SPLITTERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "sentencepiece": SentencePiece,
    "unigram": Unigram,
    "gpt2": GPT2,
}
"""Kind of a tokenizer -> class."""


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

    def join(self, pieces: Sequence[str], within_line: bool = False) -> str:
        """Return the text of pieces.

        Args:
            pieces: the end of a sentence is a line break. Other special ones are text.
            within_line: whether the first piece continues a line, so that its space stays.
        """
        lines: list[list[str]] = [[]]
        for piece in pieces:
            if piece == self.specials["eos"]:
                lines.append([])
            else:
                lines[-1].append(piece)
        first, *others = lines
        texts = [self.splitter.join(first, within_line), *map(self.splitter.join, others)]
        return "\n".join(texts)
