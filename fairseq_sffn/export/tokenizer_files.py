"""The settings of a tokenizer, from SentencePiece's or GPT-2's files, and the files that hold them.

The settings are plain values, which :class:`.text.Text` takes:

- ``kind``: ``sentencepiece`` (BPE), ``unigram`` or ``gpt2``;
- ``ids``: symbol of fairseq's dictionary -> token id;
- ``specials``: ``bos``, ``pad``, ``eos``, ``unk`` -> symbol;
- the settings of the class for the kind.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary

from ..errors import UsageError
from .tensor_files import read_json
from .tokenizer_check import check_symbols

FILE = "sffn_tokenizer.json"
"""Name of the file with the settings."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces in ``sentencepiece_model.proto``."""
KINDS = {1: "unigram", 2: "sentencepiece"}
"""Value of ``model_type`` there -> kind of the tokenizer."""


def dictionary_settings(dictionary: Dictionary) -> dict[str, Any]:
    """Return the settings that come from fairseq's dictionary."""
    return {
        "ids": {dictionary[i]: i for i in range(len(dictionary))},
        "specials": {
            "bos": dictionary[dictionary.bos()],
            "pad": dictionary[dictionary.pad()],
            "eos": dictionary[dictionary.eos()],
            "unk": dictionary[dictionary.unk()],
        },
    }


def read_sentencepiece(path: Path, dictionary: Dictionary) -> dict[str, Any]:
    """Return the settings for a model of SentencePiece.

    Args:
        path: the file of the model.
        dictionary: the language model's dictionary.

    Raises:
        UsageError: the file cannot be read, or the model is not supported.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--sentencepiece {path}: cannot be read: {error.strerror}") from error
    try:
        model = list(messages(data))
        pieces = [piece_of(value) for field, value in model if field == 1]
        trainer = dict(messages(next((v for f, v in model if f == 2), b"")))
        normalizer = dict(messages(next((v for f, v in model if f == 3), b"")))
    except (ValueError, IndexError, struct.error, TypeError) as error:
        raise UsageError(f"--sentencepiece {path}: is no model of SentencePiece") from error
    if not pieces:
        raise UsageError(f"--sentencepiece {path}: is no model of SentencePiece")
    if (kind := trainer.get(3, 1)) not in KINDS:
        raise UsageError(
            f"--sentencepiece {path}: is a model of type {kind}; export supports unigram and BPE "
            "models (types 1 and 2)"
        )
    if any(type == UNUSED for _, _, type in pieces):
        raise UsageError(f"--sentencepiece {path}: models with unused pieces are not supported")
    if KINDS[kind] == "unigram" and any(type == USER_DEFINED for _, _, type in pieces):
        raise UsageError(
            f"--sentencepiece {path}: unigram models with user-defined pieces are not supported"
        )
    settings = {
        "kind": KINDS[kind],
        **dictionary_settings(dictionary),
        "scores": {piece: score for piece, score, type in pieces if type == NORMAL},
        "user_defined": [piece for piece, _, type in pieces if type == USER_DEFINED],
        "byte_fallback": bool(trainer.get(35, 0)),
        "whitespace_as_suffix": bool(trainer.get(24, 0)),
        "charsmap": base64.b64encode(normalizer.get(2, b"")).decode(),
        "dummy_prefix": bool(normalizer.get(3, 1)),
        "remove_extra_whitespaces": bool(normalizer.get(4, 1)),
    }
    if not normalizer.get(5, 1):
        raise UsageError(f"--sentencepiece {path}: models that keep spaces are not supported")
    check_symbols(
        f"--sentencepiece {path}",
        [piece for piece, *_ in pieces],
        not settings["byte_fallback"],
        dictionary,
    )
    return settings


def piece_of(data: bytes) -> tuple[str, float, int]:
    """Return text, score and type of a piece from its message."""
    fields = dict(messages(data))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return fields[1].decode(), score, fields.get(3, NORMAL)


def messages(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each field of a protocol buffers message.

    Raises:
        ValueError: the data is no such message.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        result = shift = 0
        while True:
            byte = data[at]
            at += 1
            result |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return result
            if shift > 63:
                raise ValueError("a number is too long")

    while at < len(data):
        key = varint()
        field, wire = key >> 3, key & 7
        if wire == 0:
            yield field, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        size = {1: 8, 5: 4}.get(wire) or varint()
        if at + size > len(data):
            raise ValueError("the message is cut off")
        yield field, data[at : at + size]
        at += size


def read_gpt2_bpe(encoder: Path, merges: Path, dictionary: Dictionary) -> dict[str, Any]:
    """Return the settings for GPT-2's encoder.

    Args:
        encoder: ``encoder.json``.
        merges: ``vocab.bpe``.
        dictionary: the language model's dictionary, of numbers in ``encoder.json``.

    Raises:
        UsageError: a file cannot be read, or does not fit.
    """
    what = f"--gpt2-bpe {encoder} {merges}"
    numbers = read_json(encoder)
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")[1:-1]  # as fairseq reads it
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what}: cannot be read: {error}") from error
    pairs = [line.split() for line in lines]
    for pair in pairs:
        if len(pair) != 2 or "".join(pair) not in numbers:
            raise UsageError(f"{what}: {' '.join(pair)!r} is no merge of this encoder")
    check_symbols(what, map(str, numbers.values()), False, dictionary)
    return {
        "kind": "gpt2",
        **dictionary_settings(dictionary),
        "encoder": numbers,
        "merges": pairs,
    }


def write_tokenizer(settings: dict[str, Any], folder: Path, add_bos: bool, positions: int) -> None:
    """Write the files that transformers reads.

    Args:
        settings: see the top of this file.
        folder: where to write.
        add_bos: whether texts begin with ``<s>`` in place of ``</s>``.
        positions: the model's positions.
    """
    specials = settings["specials"]
    (folder / FILE).write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "SFFNTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_sffn.SFFNTokenizer", None]},
        "bos_token": specials["bos" if add_bos else "eos"],
        "eos_token": specials["eos"],
        "pad_token": specials["pad"],
        "unk_token": specials["unk"],
        "model_max_length": positions,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
