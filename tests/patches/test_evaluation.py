"""Evaluation reports the samples and tokens that it leaves out."""

from __future__ import annotations

import inspect
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.sequence_scorer import SequenceScorer
from fairseq_cli import eval_lm as eval_command

from fairseq_sffn.errors import UsageError
from fairseq_sffn.patches import evaluation
from fairseq_sffn.patches.left_out import Scored, binarised_tokens
from tests import commands

LENGTHS = [4, 9, 15, 16, 3, 8, 20, 5, 6, 7, 2]
"""Words of each sentence, without ``</s>``. The model has 16 positions."""
SHORT = sum(words + 1 for words in LENGTHS if words < 16)
ALL = sum(words + 1 for words in LENGTHS)
EOS = ("--task", "language_modeling", "--sample-break-mode", "eos")
SKIP = ("--skip-invalid-size-inputs-valid-test",)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the splits of sentences and documents.

    Two sentences are too long. ``short`` has 9 sentences, of which 8 make a batch; ``long`` has
    one; ``documents`` has documents of two sentences.
    """
    folder = tmp_path_factory.mktemp("lengths")
    draw = random.Random(0)
    sentences = [" ".join(f"w{draw.randrange(20)}" for _ in range(n)) for n in LENGTHS]
    short = [line for line, n in zip(sentences, LENGTHS, strict=True) if n < 16]
    splits = {
        "train": short * 8,
        "valid": sentences,
        "short": short,
        "long": sentences[6:7],
        "documents": [
            line for pair in zip(short[:8:2], short[1::2], strict=True) for line in (*pair, "")
        ],
    }
    for name, lines in splits.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    held_out = [name for name in splits if name != "train"]
    commands.run(
        *("preprocess", "--only-source", "--workers", "1", "--destdir", folder / "bin"),
        *("--trainpref", folder / "train"),
        *("--validpref", ",".join(str(folder / name) for name in held_out)),
    )
    for i, name in enumerate(held_out):
        for kind in ("bin", "idx"):
            path = folder / "bin" / f"valid{i or ''}.{kind}"
            path.rename(path.with_name(f"{name}.{kind}"))
    return folder / "bin"


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("trained")
    commands.train(data, saved, "avgk", "--disable-validation")
    return saved / "checkpoint_last.pt"


def evaluate(data: Path, checkpoint: Path, *flags: str, monkeypatch: Any) -> tuple[dict, str]:
    """Run fairseq-eval-lm, and return its result and its log."""
    results: list[dict[str, Any]] = []
    original = eval_command.eval_lm
    with monkeypatch.context() as patch:
        patch.setattr(
            eval_command, "eval_lm", lambda *a, **k: results.append(original(*a, **k)) or results[0]
        )
        log = commands.apply("eval-lm", data, checkpoint, *flags)
    return results[0], log


def told(log: str) -> list[str]:
    return re.findall(
        r"\| WARNING \| fairseq_sffn\.patches\.evaluation \| (.* of the loss: .*)", log
    )


# fairseq-eval-lm


@pytest.mark.parametrize(
    ("flags", "left_out", "reasons"),
    [
        ("--sample-break-mode none", 0, ""),
        ("--sample-break-mode eos", 38, "38 in 2 samples longer than"),
        ("--sample-break-mode complete", 38, "38 in 2 samples longer than"),
        ("--sample-break-mode complete_doc", 38, "38 in 2 samples longer than"),
        ("--sample-break-mode eos --add-bos-token", 38, "38 in 2 samples longer than"),
        ("--sample-break-mode eos --context-window 4", 38, "38 in 2 samples longer than"),
        ("--sample-break-mode none --add-bos-token", 0, ""),
        ("--sample-break-mode none --context-window 4", 0, ""),
        ("--sample-break-mode eos --output-dictionary-size 9", 38, "38 in 2 samples longer than"),
        (
            "--sample-break-mode eos --shorten-method truncate --tokens-per-sample 8",
            sum(max(words + 1 - 8, 0) for words in LENGTHS),
            "cut by --sample-break-mode eos or --shorten-method",
        ),
    ],
)
def test_eval_lm_tells_what_it_leaves_out(flags, left_out, reasons, data, checkpoint, monkeypatch):
    words = ("--gen-subset", "valid", *flags.split())
    if "dictionary-size" in flags:
        (saved,) = [data.parent / "small"]
        if not saved.exists():
            commands.train(data, saved, "avgk", "--disable-validation", *flags.split()[2:])
        checkpoint = saved / "checkpoint_last.pt"
    found, log = evaluate(data, checkpoint, *words, monkeypatch=monkeypatch)
    assert (found["tokens"], found["left_out_tokens"]) == (ALL - left_out, left_out)
    if not left_out:
        assert told(log) == []
        return
    (line,) = told(log)
    assert line.startswith(f"{left_out:,} of {ALL} tokens are left out of the loss: ")
    assert reasons in line
    assert log.index(line) > log.index("Perplexity: ")


def test_separators_of_documents_are_told(data, checkpoint, monkeypatch):
    flags = ("--gen-subset", "documents", "--sample-break-mode", "complete_doc")
    found, log = evaluate(data, checkpoint, *flags, monkeypatch=monkeypatch)
    assert found["left_out_tokens"] == 4
    (line,) = told(log)
    assert line.endswith(": 4 cut by --sample-break-mode complete_doc or --shorten-method")


def test_a_perplexity_of_nothing_is_refused(data, checkpoint):
    with pytest.raises(UsageError, match=r"^there is nothing to evaluate: 21 of 21 tokens [^\n]+$"):
        commands.apply(
            *("eval-lm", data, checkpoint, "--gen-subset", "long", "--sample-break-mode", "eos")
        )


def test_tokens_of_probability_0_are_told(data, checkpoint, monkeypatch):
    """fairseq leaves tokens with an infinite score out of the loss."""
    original = inspect.unwrap(SequenceScorer.generate)

    def generate(*args: Any, **kwargs: Any) -> Any:
        hypotheses = original(*args, **kwargs)
        for hypothesis, *_ in hypotheses:
            hypothesis["positional_scores"][0] = -torch.inf
        return hypotheses

    patched = evaluation.generate.replace(torch.no_grad()(generate))
    monkeypatch.setattr(SequenceScorer, "generate", patched)
    # fairseq's own message about it is no valid call of its logger.
    monkeypatch.setattr("logging.raiseExceptions", False)
    flags = ("--gen-subset", "short", "--sample-break-mode", "eos")
    found, log = evaluate(data, checkpoint, *flags, monkeypatch=monkeypatch)
    assert (found["tokens"], found["left_out_tokens"]) == (SHORT - 9, 9)
    assert told(log)[0].endswith(": 9 of probability 0")


def test_scored_tokens_are_finite_and_without_the_beginning():
    scored = Scored(begin=1)
    scores = torch.tensor([-1.0, -2.0, -torch.inf, -3.0])
    scored.add([[{"positional_scores": scores}], [{"positional_scores": scores[:2]}]])
    assert (scored.tokens, scored.impossible) == (3, 1)


# Validation and generation


@pytest.mark.parametrize("flags", [("--log-format", "json"), ("--log-format", "simple")], ids=str)
@pytest.mark.parametrize("task", ["language_modeling", "sffn_language_modeling"])
def test_validation_tells_what_it_leaves_out(flags, task, data, tmp_path):
    subsets = ("--valid-subset", "valid,short", "--ignore-unused-valid-subsets")
    log = commands.train(data, tmp_path, "avgk", *EOS, *SKIP, *subsets, *flags, "--task", task)
    assert f"left out: 38 of {ALL} tokens, in 2 of 11 samples" in log
    if "json" in flags:
        (record,), (whole,) = (commands.records(log, name) for name in ("valid", "short"))
        assert record["valid_left_out_tokens"] == 38
        assert record["valid_tokens"] == ALL
        assert not [name for name in whole if "tokens" in name]
    else:
        assert f"| left_out_tokens 38 | tokens {ALL}" in log
        assert log.count("| left_out_tokens") == 1


def test_validation_is_of_all_sentences(data, tmp_path):
    subsets = ("--valid-subset", "short", "--ignore-unused-valid-subsets", "--batch-size", "8")
    log = commands.train(data, tmp_path, "avgk", *EOS, *subsets, "--max-update", "2")
    found = commands.apply(
        *("eval-lm", data, tmp_path / "checkpoint_last.pt", *EOS, "--gen-subset", "short")
    )
    (record,) = commands.records(log, "short")
    assert float(record["short_ppl"]) == pytest.approx(commands.perplexity(found), abs=0.02)
    assert float(record["short_bsz"]) * 2 == 9


def test_a_training_has_the_batches_that_fairseq_makes(data, tmp_path):
    log = commands.train(data, tmp_path, "avgk", *EOS, "--disable-validation", "--max-epoch", "1")
    assert len(commands.losses(log)) == 6  # of 72 sentences: 9 batches, cut by --max-update
    log = commands.train(
        *(data, tmp_path / "2", "avgk", *EOS, "--disable-validation", "--max-epoch", "1"),
        *("--train-subset", "short", "--max-update", "50"),
    )
    assert len(commands.losses(log)) == 1  # of 9 sentences


@pytest.mark.parametrize("flags", [(), ("--batch-size", "8"), ("--max-sentences", "3")], ids=str)
def test_generation_is_of_all_sentences(flags, data, checkpoint):
    out = commands.apply("generate", data, checkpoint, *EOS, "--gen-subset", "short", *flags)
    assert sorted(map(int, re.findall(r"^H-(\d+)", out, re.MULTILINE))) == [*range(9)]


def test_generation_tells_what_it_skips(data, checkpoint):
    out = commands.apply("generate", data, checkpoint, *EOS, *SKIP, "--gen-subset", "valid")
    assert f"left out: 38 of {ALL} tokens, in 2 of 11 samples" in out
    assert "Translated 9 sentences" in out


@pytest.mark.parametrize(("subset", "skipped"), [("short", False), ("valid", True)])
def test_validate_is_of_all_sentences_or_tells(subset, skipped, data, tmp_path):
    commands.train(data, tmp_path, "avgk", *EOS, "--disable-validation", "--max-update", "2")
    out = commands.apply(
        *("validate", data, tmp_path / "checkpoint_last.pt", *EOS, "--batch-size", "8", *SKIP),
        *("--valid-subset", subset),
    )
    assert re.search(rf"valid on '{subset}' subset .* bsz 9", out), re.findall("bsz.*", out)
    assert (f"left out: 38 of {ALL} tokens, in 2 of 11 samples" in out) == skipped


@pytest.mark.parametrize("sizes", [{}, {"sizes": None}, {"sizes": [5, 4, 2]}])
def test_a_data_set_around_one_that_knows_no_sizes(sizes: dict[str, Any]) -> None:
    """fairseq's ``test_lm_context_window.py`` has such a data set."""
    inner = SimpleNamespace(**sizes)
    outer = SimpleNamespace(dataset=inner, sizes=np.array([4, 4, 2]))
    assert binarised_tokens(outer) == (11 if sizes.get("sizes") else 10)
