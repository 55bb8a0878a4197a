"""Tokenizers of other texts are refused, and the right one is not, whatever fairseq's flags."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from fairseq.data import Dictionary, encoders

from fairseq_sffn.errors import UsageError
from fairseq_sffn.export.gpt2_text import byte_letters
from fairseq_sffn.export.tokenizer_check import check_words
from fairseq_sffn.export.tokenizer_files import read_gpt2_bpe, read_sentencepiece
from tests import commands

UNKNOWN = "\u65e5\u672c\u8a9e \u8a9e of\u00a0\u65e5"
"""A line with characters that no model was trained on."""
TRAINERS: dict[str, dict[str, Any]] = {
    "bpe": {},
    "smaller": dict(vocab_size=170),
    "other_text": dict(seed=2),
    "unigram": dict(model_type="unigram"),
    "bytes": dict(byte_fallback=True, vocab_size=450),
    "suffix": dict(treat_whitespace_as_suffix=True),
    "across": dict(split_by_whitespace=False),
}


def lines_of(seed: int, count: int = 400) -> list[str]:
    """Write sentences of words that are made of syllables."""
    rng = random.Random(0)
    syllables = ["".join(rng.sample("abcdefgilmnoprstu", rng.randint(2, 3))) for _ in range(90)]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(600)]
    rng = random.Random(seed)
    return ["of the " + " ".join(rng.sample(words, 8)) for _ in range(count)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the models of SentencePiece in a folder."""
    folder = tmp_path_factory.mktemp("models")
    for name, options in TRAINERS.items():
        options = {"model_type": "bpe", "vocab_size": 200, "seed": 1, **options}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines_of(options.pop("seed"))),
            model_prefix=str(folder / name),
            minloglevel=2,
            hard_vocab_limit=False,
            **options,
        )
    return folder


def binarized(folder: Path, lines: list[str], *flags: str) -> Dictionary:
    """Binarize lines of pieces, and return the dictionary."""
    folder.mkdir()
    (folder / "text").write_text("".join(line + "\n" for line in lines))
    commands.run(
        *("preprocess", "--only-source", "--workers", "1", "--destdir", folder / "bin"),
        *("--trainpref", folder / "text", "--validpref", folder / "text", *flags),
    )
    return Dictionary.load(str(folder / "bin" / "dict.txt"))


def encoded(model: Path, lines: list[str]) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return [" ".join(processor.Encode(line, out_type=str)) for line in lines]


def check(model: Path, dictionary: Dictionary, data: Path) -> None:
    settings = read_sentencepiece(model, dictionary)
    check_words(f"--sentencepiece {model}", settings, data, dictionary)


@pytest.mark.parametrize("name", TRAINERS)
def test_only_the_right_model_is_accepted(name: str, models: Path, tmp_path: Path) -> None:
    lines = encoded(models / f"{name}.model", [*lines_of(3), UNKNOWN])
    marked = [f"__en__ {line} <doc>" for line in lines]
    cases = {
        "plain": (lines, []),
        "threshold": (lines, ["--thresholdsrc", "30"]),
        "padded": (lines, ["--padding-factor", "512"]),
        "marked": (marked, []),
    }
    for case, (text, flags) in cases.items():
        dictionary = binarized(tmp_path / case, text, *flags)
        check(models / f"{name}.model", dictionary, tmp_path / case / "bin")
        for other in TRAINERS.keys() - {name}:
            model = models / f"{other}.model"
            with pytest.raises(UsageError) as caught:
                check(model, dictionary, tmp_path / case / "bin")
                pytest.fail(f"{other} is accepted: {case}")
            assert str(caught.value).startswith(f"--sentencepiece {model}: "), other
            assert "\n" not in str(caught.value)


def test_a_dictionary_alone(models: Path, tmp_path: Path) -> None:
    """Without text, symbols that are no pieces tell."""
    dictionary = binarized(tmp_path / "a", encoded(models / "bpe.model", lines_of(3)))
    check(models / "bpe.model", dictionary, tmp_path)
    message = r"symbols in dict\.txt are no pieces of this tokenizer, such as '"
    for other in ("other_text", "unigram", "suffix", "smaller"):
        with pytest.raises(UsageError, match=message):
            check(models / f"{other}.model", dictionary, tmp_path)


def test_damaged_text_is_no_reason_to_refuse(models: Path, tmp_path: Path) -> None:
    dictionary = binarized(tmp_path / "a", encoded(models / "bpe.model", lines_of(3)))
    for file in (tmp_path / "a" / "bin").glob("*.idx"):
        file.write_bytes(file.read_bytes()[:30])
    check(models / "bpe.model", dictionary, tmp_path / "a" / "bin")


def test_gpt2(tmp_path: Path) -> None:
    """All numbers are in both encoders. What the numbers spell tells."""
    letters = list(byte_letters().values())
    merges = ["a b", "c d", "\u0120 e", "e f", "ab cd"]
    pieces = [*letters, *("".join(merge.split()) for merge in merges)]
    (tmp_path / "vocab.bpe").write_text("\n".join(["#version", *merges, ""]))
    encoders_of: list[Path] = []
    for name, order in (("right", pieces), ("wrong", pieces[::-1])):
        encoders_of.append(tmp_path / f"{name}.json")
        encoders_of[-1].write_text(json.dumps({piece: i for i, piece in enumerate(order)}))
    files = dict(gpt2_encoder_json=str(encoders_of[0]), gpt2_vocab_bpe=str(tmp_path / "vocab.bpe"))
    bpe = encoders.build_bpe(Namespace(bpe="gpt2", **files))
    text = ["abcd  ef 123 it's \u00e9", *lines_of(3, 50)]
    dictionary = binarized(tmp_path / "a", [bpe.encode(line) for line in text])
    for encoder in encoders_of:
        settings = read_gpt2_bpe(encoder, tmp_path / "vocab.bpe", dictionary)
        if encoder.stem == "right":
            check_words("--gpt2-bpe", settings, tmp_path / "a" / "bin", dictionary)
        else:
            with pytest.raises(UsageError, match=r"--gpt2-bpe: splits .* otherwise than"):
                check_words("--gpt2-bpe", settings, tmp_path / "a" / "bin", dictionary)


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_words_with_unknown_pieces_do_not_count(name: str, models: Path, tmp_path: Path) -> None:
    lines = encoded(models / f"{name}.model", lines_of(3))
    dictionary = binarized(tmp_path / "a", lines, "--thresholdsrc", "100")
    assert len(dictionary) < 150
    check(models / f"{name}.model", dictionary, tmp_path / "a" / "bin")
