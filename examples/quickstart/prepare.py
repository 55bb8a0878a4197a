"""Splits a collection by document and encodes it with its own SentencePiece model.

Writes to --output: {train,valid,test}.txt (a sentence a line), {train,valid,test}.bpe (the same
lines as space-separated pieces), spm.model, and dict.txt, the fairseq dictionary of all pieces with
their counts in train.bpe, for `fairseq-preprocess --only-source --srcdict dict.txt`.
"""

from __future__ import annotations

import argparse
import io
import lzma
import os
import random
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

SPLITS = ("train", "valid", "test")
HELD_OUT_SHARE = 0.03  # share of all characters, for valid and for test each
MAX_LINE_LENGTH = 2000  # characters
FAIRSEQ_SPECIALS = 4  # <s> <pad> </s> <unk>, which are in every fairseq dictionary

HEADER = re.compile(r"^== .*$", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.?!])(?<!\bMr\.) (?=[A-Z])")


def read_documents(path: Path) -> tuple[list[str], int]:
    """Read an xz-compressed file in which a line `== name` starts each document.

    Returns:
        The distinct, non-empty documents in order, with single spaces for whitespace; and the
        number of copies that were dropped.
    """
    try:
        text = lzma.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        sys.exit(f"--input {path}: not a readable xz file of UTF-8 text: {error}")
    before, *bodies = HEADER.split(text)
    if before.strip() or not bodies:
        sys.exit(f"--input {path}: does not start with a line `== name`, as every document must")
    documents = [" ".join(body.split()) for body in bodies if body.strip()]
    distinct = list(dict.fromkeys(documents))
    return distinct, len(documents) - len(distinct)


def split_documents(documents: list[str], seed: int) -> dict[str, list[str]]:
    """Deal whole documents to valid and test, 3% of all characters each, and the rest to train.

    Held-out documents are drawn at random from the whole collection, so that they cover all
    periods. Within a split the documents keep their order. The same seed gives the same splits.
    """
    rng = random.Random(seed)
    shuffled = sorted(range(len(documents)), key=lambda _: rng.random())
    total = sum(map(len, documents))
    chosen: dict[str, list[int]] = {split: [] for split in SPLITS}
    start = 0
    for index in shuffled:
        middle = start + len(documents[index]) / 2
        if middle < HELD_OUT_SHARE * total:
            chosen["valid"].append(index)
        elif middle < 2 * HELD_OUT_SHARE * total:
            chosen["test"].append(index)
        else:
            chosen["train"].append(index)
        start += len(documents[index])
    return {split: [documents[i] for i in sorted(indices)] for split, indices in chosen.items()}


def split_sentences(document: str) -> list[str]:
    """Cut a document into sentences.

    It is cut before a capital letter that follows . ? or !. Sentences of more than 2000 characters
    are cut at a space. The lines, joined by spaces, are the document.
    """
    return [
        line
        for sentence in SENTENCE_END.split(document)
        for line in textwrap.wrap(sentence, MAX_LINE_LENGTH, break_on_hyphens=False)
    ]


def train_sentencepiece(lines: Iterable[str], vocab_size: int) -> bytes:
    """Train a BPE model and return its file's bytes.

    Args:
        lines: training text. Other characters are encoded as bytes, so no token is ever <unk>.
        vocab_size: size of the fairseq dictionary: all pieces except SentencePiece's <unk>, and
            fairseq's 4 special tokens.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size - FAIRSEQ_SPECIALS + 1,
            bos_id=-1,
            eos_id=-1,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            max_sentence_length=4 * MAX_LINE_LENGTH,  # bytes; the trainer skips longer lines
            num_threads=1,
            minloglevel=1,
        )
    except RuntimeError as error:
        sys.exit(f"--vocab-size {vocab_size}: {error}")
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


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: it is either complete or missing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write the lines in UTF-8."""
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode("utf-8"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--input", type=Path, required=True, help="xz file; `== name` starts a document"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write to")
    parser.add_argument("--vocab-size", type=int, default=4096, help="entries of the dictionary")
    parser.add_argument("--seed", type=int, default=1, help="decides which documents are held out")
    args = parser.parse_args(argv)

    documents, dropped = read_documents(args.input)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--output {args.output}: {error.strerror}")
    splits = split_documents(documents, args.seed)
    if not all(splits.values()):
        sys.exit(f"--input {args.input}: {len(documents)} documents are too few for three splits")
    lines = {
        split: [line for document in splits[split] for line in split_sentences(document)]
        for split in SPLITS
    }
    model = train_sentencepiece(lines["train"], args.vocab_size)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    encoded = {
        split: [" ".join(pieces) for pieces in tokenizer.encode(lines[split], out_type=str)]
        for split in SPLITS
    }

    write_atomically(args.output / "spm.model", model)
    dictionary = dictionary_text(tokenizer, encoded["train"])
    write_atomically(args.output / "dict.txt", dictionary.encode("utf-8"))
    for split in SPLITS:
        write_lines(args.output / f"{split}.txt", lines[split])
        write_lines(args.output / f"{split}.bpe", encoded[split])

    print(
        f"{len(documents)} documents, {dropped} copies dropped; tokens include an end of line each"
    )
    print(f"{'split':<6}{'documents':>10}{'lines':>10}{'characters':>12}{'tokens':>12}")
    for split in SPLITS:
        characters = sum(map(len, splits[split]))
        tokens = sum(len(line.split()) + 1 for line in encoded[split])
        print(
            f"{split:<6}{len(splits[split]):>10,}{len(lines[split]):>10,}"
            f"{characters:>12,}{tokens:>12,}"
        )


if __name__ == "__main__":
    main()
