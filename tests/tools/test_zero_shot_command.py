"""``fairseq-sffn zero-shot``: its figures against a plain loop, and refused input."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from fairseq_sffn.tools import cli
from fairseq_sffn.tools.zero_shot_tasks import TASKS
from tests import commands
from tests.tools.scoring import EOS, POSITIONS, plain_score, write_task
from tests.tools.small_tasks import WORDS, zero_shot_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make requests, an encoder, data and trained models."""
    return zero_shot_folder(tmp_path_factory.mktemp("zero_shot"), "avgk", "hash_layer", "dense")


def zero_shot(folder: Path, model: str, *flags: str) -> None:
    """Run the command on a model of the folder. Later flags win."""
    checkpoint = folder / model / "checkpoint_last.pt"
    cli.main(
        [
            *("zero-shot", str(checkpoint), "--data", str(folder / "bin"), "--cpu"),
            *("--requests", str(folder / "requests"), "--bpe", "sentencepiece"),
            *("--sentencepiece-model", str(folder / "spm.model"), *flags),
        ]
    )


def figures_of(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str], *flags: str
) -> dict[str, Any]:
    zero_shot(folder, model, "--json", *flags)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model", ["dense", "hash_layer"])
def test_command_against_a_plain_loop(
    model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = figures_of(folder, model, capsys)
    assert [line["task"] for line in report["tasks"]] == list(TASKS)
    assert report["seed"] == 1 and report["checkpoint"].endswith(f"{model}/checkpoint_last.pt")

    from fairseq import checkpoint_utils

    path = str(folder / model / "checkpoint_last.pt")
    loaded = checkpoint_utils.load_model_ensemble_and_task(
        [path], arg_overrides={"data": str(folder / "bin")}
    )
    lm, symbols = loaded[0][0].eval(), loaded[2].source_dictionary
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "spm.model"))

    def ids(text: str) -> list[int]:
        return [symbols.index(piece) for piece in pieces.encode(text, out_type=str)]

    right = right_norm = 0
    for i in range(12):
        question = ids(f"Question: the {WORDS[i % 8]} of" + " the law of" * i)
        answer = ids("Answer:")
        scores = []
        for k in range(4):
            choice = f"{WORDS[(i + k) % 8]}" + " of the" * k
            tail = ids(f"Answer: {choice}")[len(answer) :]
            tokens = [*question, EOS, *answer, *tail]
            score = plain_score(lm, tokens, len(tail), POSITIONS).log_likelihood
            scores.append((score, score / len(choice)))
        right += max(range(4), key=lambda k: scores[k][0]) == i % 4
        right_norm += max(range(4), key=lambda k: scores[k][1]) == i % 4
    piqa, lambada = report["tasks"][1], report["tasks"][-1]
    assert piqa["accuracy"] == right / 12 and piqa["accuracy_norm"] == right_norm / 12
    assert piqa["documents"] == piqa["documents_of_task"] == 12 and piqa["random"] == 0.25
    assert 0 < piqa["cut_requests"] < piqa["requests"] == 48 and len(piqa["subset"]) == 16

    words = []
    for word in WORDS:
        context = ids("the law of the")
        tail = ids(f"the law of the {word}")[len(context) :]
        words.append(plain_score(lm, [*context, *tail], len(tail), POSITIONS))
    mean = sum(word.log_likelihood for word in words) / 8
    assert lambada["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert lambada["accuracy"] == sum(word.greedy for word in words) / 8
    assert lambada["accuracy_norm"] is None


def test_requests_longer_than_the_context_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " of the law" * 8
    choices = [
        {"contexts": ["the law"] * 2, "continuations": [" is", end], "label": 0}
        for end in (" a", long)
    ]
    choices.append({"contexts": ["the law" + long] * 2, "continuations": [" is", long], "label": 0})
    write_task(tmp_path, "piqa", choices)
    write_task(tmp_path, "sciq", [{**choices[2], "continuations": [" is", " a"]}])
    write_task(tmp_path, "openbookqa", choices[:1])
    flags = ("--requests", str(tmp_path), "--tasks", "piqa,sciq,openbookqa")
    names = ("requests", "cut_requests", "requests_in_pieces")
    report = figures_of(folder, "avgk", capsys, *flags)
    counts = [[task[name] for name in names] for task in report["tasks"]]
    assert counts == [[6, 3, 2], [2, 2, 0], [2, 0, 0]]
    zero_shot(folder, "avgk", *flags)
    cut = "requests are longer than the model's context and cut at the left"
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "",
        f"piqa: 3 of 6 {cut}; 2 have a continuation that is longer by itself and is scored in "
        "pieces, where lm-evaluation-harness stops",
        f"sciq: 2 of 2 {cut}",
    ]


def test_table_and_progress(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero_shot(folder, "avgk", "--tasks", "lambada,winogrande", "--documents", "5")
    printed = capsys.readouterr()
    lines = [re.split(r"  +", line.strip()) for line in printed.out.splitlines()]
    assert lines[0][0].endswith("checkpoint_last.pt: zero-shot, seed 1")
    assert lines[2] == ["documents", "accuracy", "by character", "random", "perplexity"]
    assert [line[0] for line in lines[3:]] == ["lambada", "winogrande"]
    assert lines[3][1] == "5 of 8" and lines[4][1] == "5 of 6" and lines[4][4] == "50.0%"
    assert max(map(len, printed.out.splitlines()[2:])) <= 80
    assert printed.err.splitlines()[-1] == "winogrande: 100%"


def test_figures_do_not_depend_on_batches_or_other_tasks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = figures_of(folder, "avgk", capsys, "--tasks", "lambada,piqa")["tasks"]
    for max_tokens in ("1", "100000"):
        alone = figures_of(folder, "avgk", capsys, "--tasks", "piqa", "--max-tokens", max_tokens)
        assert alone["tasks"] == both[1:]
    few = ("--tasks", "piqa", "--documents", "4")
    first = figures_of(folder, "avgk", capsys, *few)
    assert first == figures_of(folder, "avgk", capsys, *few)
    assert first["tasks"][0]["documents"] == 4
    other = figures_of(folder, "avgk", capsys, *few, "--seed", "2")
    assert other["tasks"][0]["subset"] != first["tasks"][0]["subset"]
    assert figures_of(folder, "avgk", capsys, *few, "--full")["tasks"] == both[1:]


def test_a_checkpoint_in_parts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = figures_of(folder, "avgk", capsys)
    parts = tmp_path / "avgk" / "checkpoint_last.pt"
    parts.parent.mkdir()
    checkpoint = folder / "avgk" / "checkpoint_last.pt"
    cli.main(["reshard", str(checkpoint), str(parts), "--shards", "2"])
    capsys.readouterr()
    for name in ("bin", "requests", "spm.model"):
        (tmp_path / name).symlink_to(folder / name)
    assert figures_of(tmp_path, "avgk", capsys)["tasks"] == whole["tasks"]


def test_other_encoders_of_fairseq(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2's encoder has numbers as tokens: here 256 bytes, and no merges."""
    from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

    codes = {character: byte for byte, character in bytes_to_unicode().items()}
    (tmp_path / "encoder.json").write_text(json.dumps(codes))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n\n")
    files = ("--gpt2-encoder-json", str(tmp_path / "encoder.json"))
    files += ("--gpt2-vocab-bpe", str(tmp_path / "vocab.bpe"))
    text = "\n".join(" ".join(map(str, f"the {word} .".encode())) for word in 20 * WORDS) + "\n"
    (tmp_path / "train").write_text(text)
    commands.run(
        *("preprocess", "--only-source", "--workers", "1", "--destdir", tmp_path / "bin"),
        *("--trainpref", tmp_path / "train", "--validpref", tmp_path / "train"),
    )
    commands.train(tmp_path / "bin", tmp_path / "dense", "dense", "--max-update", "1")
    checkpoint = str(tmp_path / "dense" / "checkpoint_last.pt")
    flags = ["--requests", str(folder / "requests"), "--cpu", "--bpe", "gpt2", "--json"]
    flags += ["--tasks", "lambada", "--data", str(tmp_path / "bin")]
    cli.main(["zero-shot", checkpoint, *flags, *files])
    assert json.loads(capsys.readouterr().out)["tasks"][0]["documents"] == 8
    # A model that was trained on other pieces knows none of its tokens.
    line = refusal(
        folder, "dense", capsys, *("--bpe", "gpt2", *files, "--tasks", "lambada"), encoder=False
    )
    assert line.startswith("--bpe gpt2: lambada: 100% of the tokens are not in the dict.txt of ")


# Refused input


def refusal(
    folder: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
    *flags: str,
    encoder: bool = True,
) -> str:
    """Return the one line that the command ends with, before it scores anything."""
    own = ("--bpe", "sentencepiece", "--sentencepiece-model", str(folder / "spm.model"))
    checkpoint = folder / model / "checkpoint_last.pt"
    arguments = ["zero-shot", str(checkpoint), "--data", str(folder / "bin"), "--cpu"]
    arguments += ["--requests", str(folder / "requests"), *(own if encoder else ())]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, *flags])
    line = stopped.value.code
    assert isinstance(line, str) and "\n" not in line
    assert capsys.readouterr() == ("", "")
    return line


REFUSED = [
    ("--documents 0", "must be at least 1"),
    ("--documents -3", "must be at least 1"),
    ("--max-tokens 0", "must be at least 1"),
    ("--tasks piqa,nonsense", "'nonsense' is none of hellaswag, piqa"),
    ("--requests nowhere", "there is no such folder"),
    ("--sentencepiece-model nowhere", "there is no such file"),
    ("--data nowhere", "has no dict.txt"),
    ("--model-overrides [1]", "is no dictionary"),
    ("--model-overrides {", "is no dictionary"),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED)
def test_wrong_input_is_refused_in_one_line(
    flags: str, reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(folder, "avgk", capsys, *flags.split())
    assert line.startswith(f"{flags}: ") and reason in line


def test_wrong_files_are_refused_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = folder / "nowhere" / "checkpoint_last.pt"
    line = refusal(folder, "nowhere", capsys)
    assert line == f"checkpoint {missing}: there is no such file"

    (tmp_path / "requests").mkdir()
    line = refusal(folder, "avgk", capsys, "--requests", str(tmp_path / "requests"))
    assert line == f"--requests {tmp_path / 'requests'}: has no hellaswag.jsonl"

    (tmp_path / "bad.model").write_text("no model")
    flags = ("--sentencepiece-model", str(tmp_path / "bad.model"))
    line = refusal(folder, "avgk", capsys, *flags)
    assert line.startswith("--bpe sentencepiece --sentencepiece-model ")

    line = refusal(folder, "avgk", capsys, "--bpe", "sentencepiece", encoder=False)
    assert line == "--sentencepiece-model: is required by --bpe sentencepiece"

    words = (folder / "bin" / "dict.txt").read_text().splitlines()
    (tmp_path / "dict.txt").write_text("\n".join(words[:-8]) + "\n")
    line = refusal(folder, "avgk", capsys, "--data", str(tmp_path))
    expected = f"makes {len(words) - 4} types, the model has {len(words) + 4}"
    assert line.startswith(f"--data {tmp_path}: ") and line.endswith(expected)


GOOD = {"request": {"context": "a", "continuation": " b"}, "doc_id": 0, "idx": 0, "label": 0}
BAD_LINES = [
    ("{", "line 2 is no request"),
    ("[]", "line 2 is no request"),
    (json.dumps({**GOOD, "request": {"context": "a"}}), "line 2 is no request"),
    (json.dumps({**GOOD, "idx": 1, "request": {"context": "a", "continuation": " "}}), "line 2"),
    (json.dumps({**GOOD, "idx": 1, "request": {"context": None, "continuation": "b"}}), "line 2"),
    (json.dumps({**GOOD, "idx": 1, "label": 1}), "line 2 is no request"),
    (json.dumps({**GOOD, "idx": 1, "label": ["b"]}), "line 2 is no request"),
    (json.dumps(GOOD), "line 2 is no request"),  # the same choice again
    (json.dumps({**GOOD, "idx": 2}), "document 0 lacks requests"),
    (json.dumps({**GOOD, "doc_id": 1, "label": 1}), "document 1 lacks requests"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_damaged_requests_are_refused_in_one_line(
    line: str, reason: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "piqa.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n")
    said = refusal(folder, "avgk", capsys, "--requests", str(tmp_path), "--tasks", "piqa")
    assert said.startswith(f"--requests {tmp_path}: piqa.jsonl, ") and reason in said
    (tmp_path / "piqa.jsonl").write_text("")
    said = refusal(folder, "avgk", capsys, "--requests", str(tmp_path), "--tasks", "piqa")
    assert said == f"--requests {tmp_path}: piqa.jsonl is empty"


def test_a_model_of_another_shape(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model-overrides", "{'decoder_layers': 3}")
    for model in ("avgk", "dense"):
        assert "decoder.layers.2." in refusal(folder, model, capsys, *flags)


def test_a_model_whose_texts_begin_otherwise(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --add-bos-token, texts begin with <s>."""
    flags = ("--tasks", "lambada")
    report = figures_of(folder, "avgk", capsys, *flags)
    bos = figures_of(folder, "avgk", capsys, *flags, "--model-overrides", "{'add_bos_token': True}")
    assert bos["tasks"][0]["perplexity"] != report["tasks"][0]["perplexity"]


def changed_checkpoint(folder: Path, target: Path, **options: Any) -> None:
    """Copy the folder with another ``avgk``, whose model has other options."""
    state = torch.load(folder / "avgk" / "checkpoint_last.pt", weights_only=True)
    state["cfg"]["model"].update(options)
    (target / "avgk").mkdir()
    torch.save(state, target / "avgk" / "checkpoint_last.pt")
    for name in ("bin", "requests", "spm.model"):
        (target / name).symlink_to(folder / name)


def test_a_capacity_lets_documents_compete(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_checkpoint(folder, tmp_path, sffn_eval_capacity_factor=1.0)
    line = refusal(tmp_path, "avgk", capsys)
    assert "--sffn-eval-capacity-factor 1.0 lets documents compete" in line
    overrides = ("--model-overrides", "{'sffn_eval_capacity_factor': 0}")
    assert overrides[1] in line
    without = figures_of(tmp_path, "avgk", capsys, *overrides)
    assert without["tasks"] == figures_of(folder, "avgk", capsys)["tasks"]


def test_no_language_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_checkpoint(folder, tmp_path, _name="transformer", max_target_positions=64)
    assert refusal(tmp_path, "avgk", capsys).endswith("holds no language model, but a transformer")


def test_a_model_that_predicts_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(folder / "avgk" / "checkpoint_last.pt", weights_only=True)
    changed_checkpoint(folder, tmp_path)
    state["model"]["decoder.layer_norm.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "avgk" / "checkpoint_last.pt")
    with pytest.raises(SystemExit, match="predicts what is not a number"):
        zero_shot(tmp_path, "avgk")


@pytest.mark.parametrize("flags", [["--nonsense", "3"], ["--sentencepiece", "x"]])
def test_unknown_flags_are_usage_errors(
    flags: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        zero_shot(folder, "avgk", *flags)
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err
