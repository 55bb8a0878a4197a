"""Trains a SentencePiece model, makes a fairseq dictionary, and binarises data."""

from __future__ import annotations

import io
import logging
import random
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from fairseq import options
from fairseq_cli import preprocess
from files import write_atomically

FAIRSEQ_SPECIALS = 4  # <s> <pad> </s> <unk>, which are in every fairseq dictionary
SAMPLE = 20_000_000  # characters that the SentencePiece model is trained on

SENTENCEPIECE: dict[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.9998,  # rarer characters are encoded as bytes
    "byte_fallback": True,  # so that no token is ever unknown
    "normalization_rule_name": "identity",
    "max_sentence_length": 1_000_000,  # bytes; the trainer skips longer lines
    "bos_id": -1,
    "eos_id": -1,
    "num_threads": 1,
    "minloglevel": 1,
}


def sample_lines(lines: list[str], characters: int, seed: int) -> list[str]:
    """Draw lines at random until they have so many characters, or return all lines."""
    order = list(range(len(lines)))
    random.Random(seed).shuffle(order)
    chosen = []
    for index in order:
        if characters <= 0:
            break
        characters -= len(lines[index])
        chosen.append(index)
    return [lines[i] for i in sorted(chosen)]


def train_sentencepiece(lines: list[str], pieces: int, seed: int) -> bytes:
    """Train a BPE model.

    Args:
        lines: training text.
        pieces: size of the vocabulary with <unk>.
        seed: seed of the sample.

    Returns:
        The bytes of the model's file.

    Raises:
        ValueError: the text is too small for so many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample_lines(lines, SAMPLE, seed)),
            model_writer=model,
            vocab_size=pieces,
            **SENTENCEPIECE,
        )
    except RuntimeError as error:
        raise ValueError(f"no vocabulary of {pieces} pieces: {error}") from error
    return model.getvalue()


def dictionary_text(tokenizer: sentencepiece.SentencePieceProcessor, encoded: Iterable[str]) -> str:
    """Return a fairseq dict.txt: a line `piece count` for every piece, most frequent first.

    It includes the pieces that `encoded` never uses, as a held-out text may need them (bytes).
    """
    counts = Counter(piece for line in encoded for piece in line.split())
    pieces = [
        tokenizer.id_to_piece(i) for i in range(len(tokenizer)) if not tokenizer.is_unknown(i)
    ]
    return "".join(f"{p} {counts[p]}\n" for p in sorted(pieces, key=lambda p: -counts[p]))


def encode_lines(tokenizer: sentencepiece.SentencePieceProcessor, lines: list[str]) -> list[str]:
    """Encode each line as pieces separated by spaces.

    Raises:
        ValueError: the pieces of a line do not decode to it.
    """
    encoded = []
    for line in lines:
        pieces = tokenizer.encode(line, out_type=str)
        if tokenizer.decode(pieces) != line:
            raise ValueError(f"not the same after encoding: {line[:200]}")
        encoded.append(" ".join(pieces))
    return encoded


def binarise(dictionary: Path, prefixes: dict[str, Path], output: Path, workers: int = 1) -> None:
    """Run fairseq-preprocess on encoded texts, with the given dictionary, into a new folder.

    The number of workers does not change the result.
    """
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    argv = ["--only-source", "--srcdict", str(dictionary), "--destdir", str(partial)]
    argv += ["--workers", str(workers)]
    for split, path in prefixes.items():
        argv += [f"--{split}pref", str(path)]
    logging.getLogger("fairseq_cli.preprocess").setLevel(logging.WARNING)
    preprocess.main(options.get_preprocessing_parser().parse_args(argv))
    (partial / "preprocess.log").unlink(missing_ok=True)  # it holds only the command
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)


def binarised_files(prefixes: Iterable[Path]) -> list[Path]:
    """Return the files that `binarise` makes for each split, given as FOLDER/SPLIT."""
    return [
        file
        for path in prefixes
        for file in (path.with_suffix(".bin"), path.with_suffix(".idx"), path.parent / "dict.txt")
    ]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode("utf-8"))
