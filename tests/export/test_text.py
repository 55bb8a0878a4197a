"""Tokenizers in plain Python, against SentencePiece and fairseq's encoders."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from fairseq.data import Dictionary, encoders

from fairseq_sffn.errors import UsageError
from fairseq_sffn.export.gpt2_text import GPT2, byte_letters
from fairseq_sffn.export.text import Text
from fairseq_sffn.export.tokenizer_files import read_gpt2_bpe, read_sentencepiece
from fairseq_sffn.tools.likelihood import Encoder

WORDS = (
    *("the", "of", "congress", "states", "united", "and", "citizens", "fellow", "my", "a", "house"),
    *("peace", "war", "naïve", "café", "3,000", "<b>", "x=1"),
)
ODD = (
    *("", " ", "  two  spaces ", "\ttab\tand\u00a0hard space", "e\u0301 composed? ﬁ ligature ½ Ⅷ"),
    *(
        "日本語の文章",
        "emoji 🙂🙂 x",
        "▁ mark ▁▁",
        "<unk> </s> <s> <pad> <0x41>",
        "\uff26\uff35 width",
    ),
    *(
        "\u200b zero\u200bwidth",
        "soft\u00adhyphen",
        "ﷺ \ufeff bom",
        "'s 're don't  \n\nline\n break",
    ),
    *(
        "control \x01\x7f",
        "user <b>x</b><b>",
        "가각 \u1100\u1161",
        "\r\ncarriage",
        "\u2028 separator",
    ),
)
TRAINERS: dict[str, dict[str, Any]] = {
    "identity_with_bytes": dict(byte_fallback=True, normalization_rule_name="identity"),
    "nfkc_with_bytes": dict(byte_fallback=True),
    "unknown": dict(normalization_rule_name="nmt_nfkc"),
    "folded": dict(normalization_rule_name="nmt_nfkc_cf"),
    "user_defined": dict(user_defined_symbols="<b>,</b>,ing the"),
    "untidy": dict(remove_extra_whitespaces=False, add_dummy_prefix=False, byte_fallback=True),
    "suffix": dict(treat_whitespace_as_suffix=True),
    "across_words": dict(split_by_whitespace=False, byte_fallback=True),
}


def sentences(count: int) -> list[str]:
    rng = random.Random(3)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + "." for _ in range(count)]


def noise(count: int) -> list[str]:
    rng = random.Random(4)
    alphabet = "abcdehilnost .,<>'\u00e9\u0301\u00bd\u3000\u2581\u65e5\U0001f642 "
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(count)]


MODELS = [
    (name, model_type)
    for name, model_type in itertools.product(TRAINERS, ("bpe", "unigram"))
    if (name, model_type) != ("user_defined", "unigram")
]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def spm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model of SentencePiece, and return its file."""
    name, model_type = request.param
    folder = tmp_path_factory.mktemp(f"{name}_{model_type}")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)),
        model_prefix=str(folder / "spm"),
        vocab_size=330 if TRAINERS[name].get("byte_fallback") else 100,
        model_type=model_type,
        minloglevel=2,
        hard_vocab_limit=False,
        **TRAINERS[name],
    )
    return folder / "spm.model"


def dictionary_of(bpe: Any, lines: list[str]) -> Dictionary:
    """Make the dictionary that fairseq-preprocess makes of these lines."""
    result = Dictionary()
    for line in lines:
        result.encode_line(bpe.encode(line))
    result.finalize()
    return result


def check(bpe: Any, dictionary: Dictionary, text: Text, lines: list[str]) -> None:
    """Compare token ids with those of fairseq's encoder and dictionary."""
    encoder = Encoder(bpe, dictionary)
    for line in lines:
        assert list(map(text.id_of, text.tokenize(line))) == encoder.encode(line), line


def test_sentencepiece(spm: Path) -> None:
    bpe = encoders.build_bpe(
        Namespace(
            bpe="sentencepiece",
            sentencepiece_model=str(spm),
            sentencepiece_enable_sampling=False,
            sentencepiece_alpha=None,
        )
    )
    # Unknown characters of the training text are in its dictionary.
    dictionary = dictionary_of(bpe, [*sentences(100), "日本語の文章"])
    text = Text(read_sentencepiece(spm, dictionary))
    for line in [*ODD, *noise(300), *sentences(50)]:
        if "\n" not in line:
            assert text.splitter.split(line) == bpe.sp.Encode(line, out_type=str), line
    check(bpe, dictionary, text, [*ODD, *noise(300), *sentences(50), "\n".join(noise(5))])


def test_sentencepiece_joins(spm: Path) -> None:
    """As SentencePiece, which leaves the space that it adds to the end of a line."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    text = Text(read_sentencepiece(spm, Dictionary()))
    for line in [*ODD, *noise(100), *sentences(20)]:
        pieces = processor.Encode(line, out_type=str)
        expected = processor.DecodePieces(pieces)
        if "suffix" in str(spm):
            expected = expected.removesuffix(" ")
        assert text.splitter.join(pieces) == expected, line
    assert text.join(text.tokenize("my house\nof peace")) == "my house\nof peace"


def test_the_text_of_pieces_grows_by_that_of_the_next(spm: Path) -> None:
    """Wherever a line is cut, unless it is in a character or in the spaces at its beginning."""
    text = Text(read_sentencepiece(spm, Dictionary()))
    for line in [*ODD, "a\n\n b\n", *sentences(5)]:
        pieces = text.tokenize(line)
        whole = text.join(pieces)
        for at in range(1, len(pieces)):
            before, after = text.join(pieces[:at]), text.join(pieces[at:], within_line=True)
            in_words = before and not before.endswith(("\ufffd", "\n"))
            if in_words and "suffix" not in str(spm):
                assert before + after == whole, (line, pieces[:at])
            assert whole.startswith(before.rstrip("\ufffd")), (line, pieces[:at])


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write a small encoder in the form of GPT-2's files."""
    folder = tmp_path_factory.mktemp("gpt2")
    merges, pieces = [], list(byte_letters().values())
    words = [["\u0120", *word] for word in WORDS if word.isascii()]
    for _ in range(60):
        pairs = [(a, b) for word in words for a, b in itertools.pairwise(word)]
        if not pairs:
            break
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        if "".join(best) not in pieces:
            pieces.append("".join(best))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    (folder / "encoder.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "vocab.bpe").write_text("\n".join(lines))
    return [folder / "encoder.json", folder / "vocab.bpe"]


def gpt2_encoder(files: list[Path]) -> Any:
    encoder, merges = map(str, files)
    return encoders.build_bpe(
        Namespace(bpe="gpt2", gpt2_encoder_json=encoder, gpt2_vocab_bpe=merges)
    )


def test_copies_split_alike(spm: Path, gpt2: list[Path]) -> None:
    bpe = gpt2_encoder(gpt2)
    for settings in (
        read_gpt2_bpe(*gpt2, dictionary_of(bpe, sentences(100))),
        read_sentencepiece(spm, dictionary_of(bpe, [])),
    ):
        text = Text(settings)
        line = sentences(1)[0]
        pieces = text.tokenize(line)
        for other in (pickle.loads(pickle.dumps(text)), copy.deepcopy(text)):
            assert other.tokenize(line) == pieces


def test_gpt2(gpt2: list[Path]) -> None:
    bpe = gpt2_encoder(gpt2)
    dictionary = dictionary_of(bpe, sentences(100))
    text = Text(read_gpt2_bpe(*gpt2, dictionary))
    assert isinstance(text.splitter, GPT2)
    check(bpe, dictionary, text, [*ODD, *noise(300), *sentences(50)])
    for line in [*sentences(10), "two  spaces 🙂", " a\n b"]:
        assert text.join(text.tokenize(line)) == line


def test_unknown_pieces_and_special_names(gpt2: list[Path]) -> None:
    dictionary = Dictionary()
    text = Text({**read_gpt2_bpe(*gpt2, dictionary)})
    assert text.tokenize("\n") == ["</s>"]
    assert {text.id_of(piece) for piece in text.tokenize("</s> the")} == {dictionary.unk()}
    assert text.join(["</s>", "<pad>", "<s>"]) == "\n<pad><s>"


def refused(expected: str, read: Any, *args: Any) -> None:
    with pytest.raises(UsageError, match=expected) as caught:
        read(*args)
    assert "\n" not in str(caught.value)


def test_refusals(gpt2: list[Path], tmp_path: Path) -> None:
    encoder, merges = gpt2
    refused("cannot be read: No such file", read_sentencepiece, tmp_path / "no", Dictionary())
    for damaged in (b"", b"text", bytes(range(256)), b"\x0a\xff\xff\xff\xff\x7f"):
        (tmp_path / "spm").write_bytes(damaged)
        refused("is no model of Sent", read_sentencepiece, tmp_path / "spm", Dictionary())
    refused("is not JSON", read_gpt2_bpe, merges, merges, Dictionary())
    (tmp_path / "m").write_text("#\nq zz\n")
    refused("'q zz' is no merge", read_gpt2_bpe, encoder, tmp_path / "m", Dictionary())
    other = Dictionary()
    other.add_symbol("word")
    refused("1 of the 1 symbols in dict.txt .* 'word'", read_gpt2_bpe, encoder, merges, other)


@pytest.mark.parametrize(("model_type", "number"), [("word", 3), ("char", 4)])
def test_other_models_are_refused(model_type: str, number: int, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)),
        model_prefix=str(tmp_path / "spm"),
        model_type=model_type,
        vocab_size=30,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    refused(
        f"is a model of type {number}; .* unigram and BPE",
        *(read_sentencepiece, tmp_path / "spm.model", Dictionary()),
    )


def test_unigram_models_with_user_defined_pieces_are_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=60,
        user_defined_symbols="<b>",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    message = "unigram models with user-defined pieces are not supported"
    refused(message, read_sentencepiece, tmp_path / "spm.model", Dictionary())


def test_unigram_ties(tmp_path: Path) -> None:
    """Scores that are multiples of a tenth, so that many sums are equal or differ by rounding."""
    rng = random.Random(5)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["".join(rng.choices("abc ", k=40)) for _ in range(200)]),
        model_prefix=str(tmp_path / "spm"),
        model_type="unigram",
        vocab_size=40,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    model.ParseFromString((tmp_path / "spm.model").read_bytes())
    for piece in model.pieces[3:]:  # behind the special ones
        piece.score = -0.1 * rng.randint(9, 11) * len(piece.piece)
    (lone,) = [i for i, piece in enumerate(model.pieces) if piece.piece == "c"]
    del model.pieces[lone]  # unknown, but in other pieces
    (tmp_path / "spm.model").write_bytes(model.SerializeToString())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    text = Text(read_sentencepiece(tmp_path / "spm.model", Dictionary()))
    for _ in range(500):
        line = "".join(rng.choices("abcde ", k=30))
        assert text.splitter.split(line) == processor.Encode(line, out_type=str), line
