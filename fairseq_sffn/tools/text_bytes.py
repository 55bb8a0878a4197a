"""Number of bytes of a binarised text, for losses in bits per byte.

Losses per token of models with different vocabularies do not compare, because their tokens have
different lengths. Losses per byte of the same text do: the bits of all tokens of a set, divided by
the bytes of the text that its tokens decode to.

The text is UTF-8. Each ``</s>`` is a line break and counts as one byte, because the model predicts
it as well. The text therefore has the size of the file that was encoded, if the encoder changes
nothing and the file ends with a line break.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairseq.data import Dictionary, data_utils

from ..errors import UsageError
from .likelihood import Encoder


def count_bytes(folder: Path, split: str, bpe: Any, types: int | None = None) -> int:
    """Return the bytes of the text of a set.

    Args:
        folder: folder made by fairseq-preprocess.
        split: the split.
        bpe: one of fairseq's encoders, with which the text was encoded.
        types: number of types that the model predicts; ``None``: all of the dictionary. Other
            tokens are predicted as ``<unk>``.

    Raises:
        UsageError: the bytes cannot be known, because a token is ``<unk>``, or because the encoder
            does not make the set's tokens of the decoded text.
    """
    name = f"{folder}:{split}"
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    lines = data_utils.load_indexed_dataset(str(folder / split), dictionary)
    encoder = Encoder(bpe, dictionary)
    unknown = tokens = size = 0
    wrong: int | None = None
    for number in range(len(lines)):
        ids = lines[number].tolist()
        tokens += len(ids)
        unknown += sum(id == dictionary.unk() or id >= (types or len(dictionary)) for id in ids)
        if unknown or wrong:
            continue
        text = decoded(encoder, ids)
        if text is None:
            wrong = number + 1
        else:
            size += len(text.encode())
    if unknown:
        raise UsageError(
            f"{name}: has no bits per byte: {unknown:,} of {tokens:,} tokens are <unk>, whose "
            "text is not known"
        )
    if wrong:
        raise UsageError(
            f"{name}: has no bits per byte: line {wrong:,} is not what the encoder after --bpe "
            "makes of its text"
        )
    return size


def decoded(encoder: Encoder, ids: list[int]) -> str | None:
    """Return the text of token ids; ``None``: the encoder makes other tokens of it."""
    try:
        text = encoder.decode(ids)
    except (ValueError, KeyError):  # for GPT-2's encoder, tokens are numbers
        return None
    return text if encoder.encode(text) == ids else None
