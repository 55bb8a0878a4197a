"""Bits per byte against the bytes of files of real text, and sets whose bytes are not known."""

from __future__ import annotations

import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from fairseq.data import encoders

from fairseq_sffn.errors import UsageError
from fairseq_sffn.tools import cli
from fairseq_sffn.tools.text_bytes import count_bytes
from fairseq_sffn.tools.zero_shot import build_encoder
from tests import commands

FLAGS = ("--cpu", "--num-workers", "0", "--tokens-per-sample", "16")
EXTRA = ["caf\u00e9 \u2014 \u4e2d\u6587 \U0001f600", "", "a"]
"""Characters of two to four bytes, an empty line and a short one."""


def real_lines() -> list[str]:
    """Return 60 lines of an address of 1790, and lines with long characters."""
    path = commands.EXAMPLES / "data" / "state_of_the_union.txt.xz"
    with lzma.open(path, "rt", encoding="utf-8") as text:
        words = text.read(20_000).split()
    return [*(" ".join(words[i : i + 30]) for i in range(0, 1800, 30)), *EXTRA]


def spm(path: Path, lines: list[str], pieces: int, **options: Any) -> sentencepiece.Any:
    """Train a SentencePiece model whose unknown characters become bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        **{"model_type": "bpe", "vocab_size": pieces, "bos_id": -1, "eos_id": -1},
        **{"num_threads": 1, "minloglevel": 2, "byte_fallback": True, "character_coverage": 0.99},
        **options,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def binarise(folder: Path, lines: list[str], *flags: Any) -> None:
    """Binarise encoded lines as the splits train and valid, in ``folder / "bin"``."""
    (folder / "coded").write_text("\n".join(lines) + "\n")
    commands.run(
        *("preprocess", "--only-source", "--workers", "1", "--destdir", folder / "bin"),
        *("--trainpref", folder / "coded", "--validpref", folder / "coded", *flags),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a file of real text, SentencePiece models of two sizes, data and a trained model."""
    folder = tmp_path_factory.mktemp("text")
    lines = real_lines()
    (folder / "text").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, pieces in (("small", 360), ("large", 600)):
        (folder / name).mkdir()
        model = spm(folder / name / "spm.model", lines, pieces, normalization_rule_name="identity")
        binarise(folder / name, [" ".join(model.encode(line, out_type=str)) for line in lines])
        commands.train(folder / name / "bin", folder / name, "avgk", "--max-update", "1")
    return folder


def evaluate(folder: Path, *flags: str) -> None:
    """Run the command on the model and the set of a folder."""
    cli.main(
        [
            *("evaluate", str(folder / "checkpoint_last.pt"), f"{folder / 'bin'}:valid"),
            *(*FLAGS, "--bpe", "sentencepiece"),
            *("--sentencepiece-model", str(folder / "spm.model"), *flags),
        ]
    )


def test_bits_per_byte_are_the_bits_of_the_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = len((folder / "text").read_bytes())
    assert size > len((folder / "text").read_text(encoding="utf-8"))
    tokens = {}
    for name in ("small", "large"):
        evaluate(folder / name, "--json")
        (found,) = json.loads(capsys.readouterr().out)["sets"].values()
        lines = (folder / name / "coded").read_text().splitlines()
        tokens[name] = sum(len(line.split()) + 1 for line in lines)
        assert found["bytes"] == size and found["tokens"] == tokens[name]
        bits = found["loss"] * tokens[name]
        assert found["bits_per_byte"] == pytest.approx(bits / size, rel=1e-9)
    assert tokens["small"] > tokens["large"]

    evaluate(folder / "small")
    head, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[-3:] == ["perplexity", "bytes", "bits/byte"]
    assert row[-2] == f"{size:,}" and 0 < float(row[-1]) < float(row[-4])


def test_bytes_are_told_only_on_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "small"
    name = f"{path / 'bin'}:valid"
    cli.main(["evaluate", str(path / "checkpoint_last.pt"), name, *FLAGS, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["sets"][name].keys() == {"loss", "perplexity", "tokens", "left_out_tokens"}


def test_normalised_text_counts(tmp_path: Path) -> None:
    """By default, SentencePiece makes one space of several, and ASCII of full-width letters."""
    lines = ["the  law \uff21 of", "peace"]
    model = spm(tmp_path / "spm.model", [*real_lines(), "the law A of peace"], 360)
    binarise(tmp_path, [" ".join(model.encode(line, out_type=str)) for line in lines])
    bpe = build_encoder("sentencepiece", ["--sentencepiece-model", str(tmp_path / "spm.model")])
    assert count_bytes(tmp_path / "bin", "valid", bpe) == len(b"the law A of\npeace\n")


def test_bytes_of_other_encoders(tmp_path: Path) -> None:
    from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

    codes = {character: byte for byte, character in bytes_to_unicode().items()}
    (tmp_path / "encoder.json").write_text(json.dumps(codes))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n\n")
    files = ["--gpt2-encoder-json", str(tmp_path / "encoder.json")]
    files += ["--gpt2-vocab-bpe", str(tmp_path / "vocab.bpe")]
    lines = real_lines()
    size = len(("\n".join(lines) + "\n").encode())
    for name, flags in (("gpt2", files), ("characters", []), ("bytes", [])):
        bpe = build_encoder(name, flags)
        (tmp_path / name).mkdir()
        binarise(tmp_path / name, [bpe.encode(line) for line in lines])
        assert count_bytes(tmp_path / name / "bin", "valid", bpe) == size
    assert {"gpt2", "characters", "bytes"} <= set(encoders.BPE_REGISTRY)


# Sets whose bytes are not known


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Return the one line that the command ends with."""
    with pytest.raises(UsageError) as stopped:
        evaluate(folder, *flags)
    assert not capsys.readouterr().out
    line = str(stopped.value.code)
    assert "\n" not in line
    return line


def test_unknown_words_have_no_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coded = (folder / "small" / "coded").read_text().splitlines()
    coded[3] = f"nowhere {coded[3]} nothing"
    binarise(tmp_path, coded, "--srcdict", folder / "small" / "bin" / "dict.txt")
    for name in ("checkpoint_last.pt", "spm.model"):
        (tmp_path / name).symlink_to(folder / "small" / name)
    tokens = sum(len(line.split()) + 1 for line in coded)
    assert refusal(tmp_path, capsys) == (
        f"{tmp_path / 'bin'}:valid: has no bits per byte: 2 of {tokens:,} tokens are <unk>, whose "
        "text is not known"
    )


def test_types_that_are_not_predicted_have_no_bytes(folder: Path) -> None:
    model = str(folder / "small" / "spm.model")
    bpe = build_encoder("sentencepiece", ["--sentencepiece-model", model])
    with pytest.raises(UsageError, match=r"has no bits per byte: [\d,]+ of [\d,]+ tokens are <unk"):
        count_bytes(folder / "small" / "bin", "valid", bpe, types=60)


def test_the_encoder_is_that_of_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(folder / "large" / "spm.model")
    line = refusal(folder / "small", capsys, "--sentencepiece-model", other)
    assert line == (
        f"{folder / 'small' / 'bin'}:valid: has no bits per byte: line 1 is not what the encoder "
        "after --bpe makes of its text"
    )
    gone = refusal(folder / "small", capsys, "--sentencepiece-model", "nowhere")
    assert gone == "--sentencepiece-model nowhere: there is no such file"


def test_every_token_is_scored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(folder / "small", capsys, "--sample-break-mode", "eos")
    assert "tokens are left out of the loss; --sample-break-mode none scores all" in line
