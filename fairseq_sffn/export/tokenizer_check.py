"""Checks that a tokenizer is the one that split a language model's training text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary, data_utils

from ..errors import UsageError
from .text import Text

MOST_STRANGE = 0.01
"""Largest share of symbols that may be those of another tokenizer."""
MOST_CHANGED = 0.002
"""Largest share of words that may be split otherwise."""
MOST_WORDS = 2000
"""Number of different words that are split again."""
SHOWN = 80
"""Number of characters of a word that a message shows."""
SPLITS = ("valid", "test", "train")
"""Parts of the data to take words from: the first that is there."""
PADDING = "madeupword"
"""Start of the types by which fairseq fills up a dictionary."""
TAG = re.compile(r"<(?!0x).*>|\[.*\]|__.*__")
"""Symbols that no tokenizer made: marks of languages, documents, and so on."""


def check_symbols(
    what: str, pieces: Iterable[str], keeps_unknown: bool, dictionary: Dictionary
) -> None:
    """Refuse a tokenizer that cannot have made the symbols of a dictionary.

    Args:
        what: the flag and its value, for the message.
        pieces: all pieces of the tokenizer.
        keeps_unknown: whether runs of characters without a piece are pieces of a text.
        dictionary: the language model's dictionary.

    Raises:
        UsageError: too many symbols are neither pieces nor tags.
    """
    # fairseq splits at white space, also within a piece.
    known = {part for piece in pieces for part in piece.split()}
    symbols = [
        symbol
        for symbol in dictionary.symbols[dictionary.nspecial :]
        if not symbol.startswith(PADDING) and not TAG.fullmatch(symbol)
    ]
    strange = [
        symbol
        for symbol in symbols
        if symbol not in known and not (keeps_unknown and known.isdisjoint(symbol))
    ]
    if len(strange) > MOST_STRANGE * len(symbols):
        raise UsageError(
            f"{what}: {len(strange)} of the {len(symbols)} symbols in dict.txt are no pieces of "
            f"this tokenizer, such as {strange[0]!r}"
        )


def check_words(what: str, settings: dict[str, Any], data: Path, dictionary: Dictionary) -> None:
    """Refuse a tokenizer that splits words of the data otherwise than the data are split.

    Args:
        what: the flag and its value, for the message.
        settings: those of the tokenizer.
        data: folder of binarized text. Without text in it, nothing is checked.
        dictionary: the language model's dictionary.

    Raises:
        UsageError: too many words are split otherwise.
    """
    text = Text(settings)
    words: dict[tuple[str, ...], None] = {}  # a set in the order of the text
    for word in words_of(data, text, dictionary):
        words[word] = None
        if len(words) == MOST_WORDS:
            break
    changed = [word for word in words if not is_kept(word, text)]
    if len(changed) > MOST_CHANGED * len(words):
        shown = min(map(" ".join, changed), key=len)[:SHOWN]
        raise UsageError(
            f"{what}: splits {len(changed)} of {len(words)} words otherwise than the text of "
            f"{data}, such as {shown!r}"
        )


def is_kept(word: tuple[str, ...], text: Text) -> bool:
    """Return whether the text of a word's pieces is split into these pieces."""
    try:
        return " ".join(text.splitter.split_again(word)).split() == list(word)
    except UnicodeDecodeError:  # a character is never in two words
        return False


def words_of(data: Path, text: Text, dictionary: Dictionary) -> Iterator[tuple[str, ...]]:
    """Yield the pieces of each word of binarized text that has no other symbols.

    A word begins with a space. If a piece may have spaces elsewhere, a word is a whole line.
    """
    found = filter(None, (load(data / split, dictionary) for split in SPLITS))
    rows: Iterable[Any] = next(found, [])
    specials = {dictionary.bos(), dictionary.pad(), dictionary.eos()}
    has, begins_word = text.splitter.has, text.splitter.begins_word
    for row in rows:
        word: list[str] = []
        whole = True
        for number in row.tolist():
            piece = dictionary[number]
            known = number != dictionary.unk() and has(piece)
            is_tag = number != dictionary.unk() and not known and TAG.fullmatch(piece) is not None
            ends = number in specials or is_tag
            if ends or begins_word(piece):
                if word and whole:
                    yield tuple(word)
                word, whole = [], True
            if not ends:
                word.append(piece)
                whole &= known
        if word and whole:
            yield tuple(word)


def load(path: Path, dictionary: Dictionary) -> Any:
    """Return binarized text; ``None``: it is not there, or cannot be read."""
    try:
        return data_utils.load_indexed_dataset(str(path), dictionary)
    except Exception:  # a damaged file is no reason to refuse an export, which does not need it
        return None
