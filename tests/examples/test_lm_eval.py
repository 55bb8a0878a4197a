"""The tasks and the adapter for lm-evaluation-harness.

The harness is not installed with the project. Without it, the tests that need it are skipped.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.models import FairseqLanguageModel

from fairseq_sffn.errors import UsageError
from fairseq_sffn.tools import cli, zero_shot
from fairseq_sffn.tools.zero_shot_tasks import TASKS, draw, read_documents
from tests import commands
from tests.tools.scoring import EOS, POSITIONS, Table, plain_score, write_task
from tests.tools.small_tasks import WORDS, zero_shot_folder
from zero_shot import lm_eval_tasks

PROGRAM = commands.EXAMPLES / "zero_shot" / "lm_eval_adapter.py"

# The tasks


def test_tasks_are_the_documents_of_the_command(tmp_path: Path) -> None:
    choices = [
        {"contexts": [f"Question {i}\nAnswer:"] * 2, "continuations": [" a", "  b "], "label": 1}
        for i in range(9)
    ]
    write_task(tmp_path / "requests", "piqa", choices)
    subjects = [{"contexts": ["he", "she"], "continuations": [" is"] * 2, "label": 0}]
    write_task(tmp_path / "requests", "winogrande", subjects)
    words = [{"contexts": ["the law of"], "continuations": [" peace"], "label": ["peace"]}]
    write_task(tmp_path / "requests", "lambada", words)
    flags = ["--requests", str(tmp_path / "requests"), "--output", str(tmp_path / "tasks")]
    lm_eval_tasks.main([*flags, "--tasks", "piqa,winogrande,lambada", "--documents", "4"])

    def written(task: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "tasks" / f"{task}.jsonl").open()]

    drawn = draw(read_documents(tmp_path / "requests", "piqa"), "piqa", 4, seed=1)
    assert written("piqa") == [
        {
            "number": document.number,
            "label": 1,
            "context": f"Question {document.number}\nAnswer:",
            "choices": ["a", " b "],
        }
        for document in drawn
    ]
    assert written("winogrande") == [
        {"number": 0, "label": 0, "contexts": ["he", "she"], "continuation": "is"}
    ]
    assert written("lambada") == [
        {"number": 0, "label": 0, "context": "the law of", "continuation": " peace"}
    ]
    configuration = json.loads((tmp_path / "tasks" / "piqa.yaml").read_text())
    files = configuration["dataset_kwargs"]["data_files"]
    assert files == {"test": str(tmp_path / "tasks" / "piqa.jsonl")}


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([(["a", "a"], ["b", " c"])], "piqa: the continuation 'b' does not begin with a space"),
        ([(["a", "b"], [" b", " c"])], "piqa: document 0 has several contexts and continuations"),
        (
            [(["a", "a"], [" b", " c"]), (["a", "b"], [" b", " b"])],
            "piqa: some documents have several contexts, others one",
        ),
    ],
)
def test_requests_that_make_no_task(
    documents: list[tuple[list[str], list[str]]], message: str, tmp_path: Path
) -> None:
    write_task(
        tmp_path,
        "piqa",
        [{"contexts": each, "continuations": ends, "label": 0} for each, ends in documents],
    )
    flags = ["--requests", str(tmp_path), "--output", str(tmp_path / "tasks"), "--tasks", "piqa"]
    with pytest.raises(UsageError, match=f"^{message}$"):
        lm_eval_tasks.main(flags)


# The adapter


@pytest.fixture(scope="module")
def adapter() -> Any:
    """Import the adapter, which needs the harness."""
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'"
    )
    os.environ["HF_HUB_OFFLINE"] = "1"  # datasets reads it when it is imported
    from zero_shot import lm_eval_adapter

    return lm_eval_adapter


@pytest.fixture(scope="module")
def folder(adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make requests, their tasks, data and trained models."""
    folder = zero_shot_folder(tmp_path_factory.mktemp("lm_eval"), "avgk", "hash_layer")
    flags = ["--requests", str(folder / "requests"), "--output", str(folder / "tasks")]
    lm_eval_tasks.main(flags)
    return folder


def load(adapter: Any, folder: Path, model: str = "avgk", **options: Any) -> Any:
    """Load a model of the folder."""
    return adapter.FairseqLM(
        **{
            "checkpoint": str(folder / model / "checkpoint_last.pt"),
            "data": str(folder / "bin"),
            "bpe": "sentencepiece",
            "sentencepiece_model": str(folder / "spm.model"),
            "device": "cpu",
        }
        | options
    )


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=i)
        for i, each in enumerate(arguments)
    ]


def harness_results(lm: Any, folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the results of the harness on all tasks of the folder."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=["zero_shot"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        log_samples=True,
        bootstrap_iters=2,
    )


def command_results(
    folder: Path,
    model: str,
    max_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return the report of ``fairseq-sffn zero-shot``, and the log-likelihoods of each task."""
    scores: dict[str, list[float]] = {}
    original = zero_shot.task_figures

    def recorded(task: str, documents: Any, found: Any, types: int) -> Any:
        scores[task] = [score.log_likelihood for score in found]
        return original(task, documents, found, types)

    monkeypatch.setattr(zero_shot, "task_figures", recorded)
    capsys.readouterr()
    cli.main(
        [
            *("zero-shot", str(folder / model / "checkpoint_last.pt"), "--cpu", "--json"),
            *("--data", str(folder / "bin"), "--requests", str(folder / "requests")),
            *("--bpe", "sentencepiece", "--sentencepiece-model", str(folder / "spm.model")),
            *("--max-tokens", str(max_tokens)),
        ]
    )
    return json.loads(capsys.readouterr().out), scores


@pytest.mark.parametrize(
    ("model", "max_tokens", "tolerance"),
    # In batches, scores depend on the other requests by rounding.
    [("avgk", 1, {"abs": 1e-6, "rel": 0}), ("hash_layer", 4096, {"rel": 1e-6})],
)
def test_harness_and_command_agree(
    model: str,
    max_tokens: int,
    tolerance: dict[str, float],
    adapter: Any,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same log-likelihoods, accuracies, standard errors and perplexities on all requests."""
    results = harness_results(load(adapter, folder, model, max_tokens=max_tokens), folder, tmp_path)
    report, scores = command_results(folder, model, max_tokens, monkeypatch, capsys)
    assert [line["task"] for line in report["tasks"]] == list(TASKS)
    for line in report["tasks"]:
        name = f"zero_shot_{line['task']}"
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(samples) == line["documents"]
        found = [float(score) for sample in samples for ((score, _),) in sample["resps"]]
        assert found == pytest.approx(scores[line["task"]], **tolerance)
        figures = results["results"][name]
        assert figures["acc,none"] == pytest.approx(line["accuracy"], abs=1e-6)
        assert figures["acc_stderr,none"] == pytest.approx(line["standard_error"], abs=1e-6)
        if line["task"] == "lambada":
            assert figures["perplexity,none"] == pytest.approx(line["perplexity"], rel=1e-6)
        elif line["task"] == "winogrande":
            assert line["accuracy_norm"] == line["accuracy"]  # all continuations are equal
        else:
            assert figures["acc_norm,none"] == pytest.approx(line["accuracy_norm"], abs=1e-6)


def ids(lm: Any, text: str) -> list[int]:
    return lm.encoder.encode(text)


def test_rolling_log_likelihoods(adapter: Any, folder: Path) -> None:
    """Each token counts once. The windows are those of the harness."""
    lm = load(adapter, folder)
    short, long = "the law of the people .", "the law\nof the " + "nation is peace and " * 8
    assert len(ids(lm, short)) < POSITIONS < 2 * POSITIONS < len(ids(lm, long))
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (short,), (long,), ("",)))
    model = lm.scorer.model
    tokens = ids(lm, short)
    assert found[0] == pytest.approx(
        plain_score(model, tokens, len(tokens), POSITIONS).log_likelihood, abs=1e-5
    )
    tokens, expected = [EOS, *ids(lm, long)], 0.0
    for begin in range(1, len(tokens), POSITIONS):
        end = min(begin + POSITIONS, len(tokens))
        context = tokens[end - POSITIONS - 1 : begin]
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *tokens[begin : end - 1]]]))[0][0]
        log_probs = logits.log_softmax(1)[len(context) - 1 :]
        expected += float(log_probs.gather(1, torch.tensor(tokens[begin:end])[:, None]).sum())
    assert found[1] == pytest.approx(expected, abs=1e-4)
    assert found[2] == 0.0


def never(lm: Any) -> list[int]:
    """Return the token ids that the adapter does not generate."""
    symbols = lm.scorer.dictionary
    padding = [i for i in range(len(symbols)) if symbols[i].startswith("madeupword")]
    return [symbols.bos(), symbols.pad(), symbols.unk(), *padding]


def greedy(lm: Any, context: str, length: int) -> tuple[list[int], list[int]]:
    """Return the context's tokens that fit, without the start, and greedy tokens, each from a whole
    forward pass of one sequence."""
    tokens = [EOS, *ids(lm, context)][-(POSITIONS - length) :]
    count, begin = len(tokens), int(len(ids(lm, context)) < POSITIONS - length)
    for _ in range(length):
        with torch.no_grad():
            logits = lm.scorer.model(torch.tensor([tokens]))[0][0, -1]
        logits[never(lm)] = -math.inf
        tokens.append(int(logits.argmax()))
    return tokens[begin:count], tokens[count:]


@pytest.mark.parametrize("model", ["avgk", "hash_layer"])
def test_generation(model: str, adapter: Any, folder: Path) -> None:
    """In one batch: short and long contexts, one that is cut, and one with a line break."""
    lm = load(adapter, folder, model)
    with torch.no_grad():  # a trained model this small generates one word, whatever the context
        for name, parameter in lm.scorer.model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.add_(torch.randn_like(parameter))
    lengths: set[int] = set()
    lm.scorer.model.register_forward_pre_hook(lambda _, inputs: lengths.add(inputs[0].shape[1]))
    contexts = ["the", "the law of the people is", "the law of" * 9, "the law .\nthe", ""]
    options = {"max_gen_toks": 6, "until": []}
    requests = instances("generate_until", *((context, options) for context in contexts))
    texts = lm.generate_until(requests)
    assert len(set(texts)) > 2 and max(lengths) == POSITIONS - 1
    for context, text in zip(contexts, texts, strict=True):
        before, after = greedy(lm, context, 6)
        whole = lm.encoder.decode([*before, *after])
        assert whole == lm.encoder.decode(before) + text and text
    # Stop sequences are not in the text, nor is what follows them.
    stop = texts[1].strip()[2]
    stopped = lm.generate_until(
        instances("generate_until", (contexts[1], options | {"until": [stop, "nowhere"]}))
    )
    assert stopped == [texts[1].split(stop)[0]]


def test_text_after_a_context_keeps_its_space(adapter: Any, folder: Path) -> None:
    lm = load(adapter, folder)
    prompt = adapter.Prompt(lm, [EOS, *ids(lm, "the law")], 3, [])
    for token in ids(lm, "of peace"):
        prompt.add(token)
    whole = lm.encoder.decode([*ids(lm, "the law"), *prompt.generated])
    assert prompt.text.startswith(" of") and "the law" + prompt.text == whole


@pytest.mark.parametrize(("stops", "text"), [([], " of\npeace"), (["\n"], " of")])
def test_a_line_break_is_text(stops: list[str], text: str, adapter: Any, folder: Path) -> None:
    lm = load(adapter, folder)
    tokens = ids(lm, "of\npeace")
    prompt = adapter.Prompt(lm, [EOS, *ids(lm, "the law")], len(tokens) + 1, stops)
    for token in tokens:
        prompt.add(token)
    assert EOS in tokens and prompt.text == text and prompt.done == bool(stops)


def test_special_types_are_not_generated(adapter: Any, folder: Path) -> None:
    lm = load(adapter, folder)
    symbols = lm.scorer.dictionary
    logits = torch.zeros(len(symbols), len(symbols))
    (word,) = ids(lm, "peace")
    preferred = [symbols.unk(), symbols.pad(), symbols.bos(), word]
    logits[:, preferred] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    lm.scorer = replace(lm.scorer, model=FairseqLanguageModel(Table(logits)))
    request = instances("generate_until", ("the", {"max_gen_toks": 2, "until": []}))
    assert lm.generate_until(request) == [" peace peace"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 1.0}, "only greedy decoding is supported"),
        ({"max_gen_toks": 16}, "max_gen_toks=16 does not fit the model's context of 16 tokens"),
    ],
)
def test_generation_that_is_refused(
    options: dict[str, Any], message: str, adapter: Any, folder: Path
) -> None:
    lm = load(adapter, folder)
    with pytest.raises(UsageError, match=message):
        lm.generate_until(instances("generate_until", ("the", options)))


def test_other_models_are_refused(adapter: Any, folder: Path) -> None:
    with pytest.raises(UsageError, match="--batch_size 8: batches are in tokens"):
        load(adapter, folder, batch_size=8)
    with pytest.raises(UsageError, match="--sentencepiece-model nowhere: there is no such file"):
        load(adapter, folder, sentencepiece_model="nowhere")
    lm = load(adapter, folder)
    with pytest.raises(UsageError, match=r"80% of the tokens are not in the dict\.txt"):
        lm.loglikelihood(instances("loglikelihood", ("\u4e00", " \u4e00")))


def gpt2_of_bytes(folder: Path) -> dict[str, str]:
    """Write GPT-2's encoder with 256 bytes and no merges, and a model that was trained on it."""
    from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

    codes = {character: byte for byte, character in bytes_to_unicode().items()}
    (folder / "encoder.json").write_text(json.dumps(codes))
    (folder / "vocab.bpe").write_text("#version: 0.2\n\n")
    lines = [" ".join(map(str, f"the caf\u00e9 of {word}".encode())) for word in 5 * WORDS]
    (folder / "train").write_text("\n".join(lines) + "\n")
    commands.run(
        *("preprocess", "--only-source", "--workers", "1", "--destdir", folder / "bin"),
        *("--trainpref", folder / "train", "--validpref", folder / "train"),
    )
    commands.train(folder / "bin", folder / "avgk", "avgk", "--max-update", "1")
    files = {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"}
    return {option: str(folder / name) for option, name in files.items()}


def test_gpt2_encoder_and_shards(adapter: Any, tmp_path: Path) -> None:
    files = gpt2_of_bytes(tmp_path)
    whole = tmp_path / "avgk" / "checkpoint_last.pt"
    shards = tmp_path / "shards" / "checkpoint_last.pt"
    shards.parent.mkdir()
    commands.sffn("reshard", whole, shards, "--shards", "2")
    pairs = [("the caf\u00e9 of", " peace"), ("the", " caf\u00e9"), ("", "the")]
    found = []
    for path in (whole, shards):
        lm = adapter.FairseqLM(str(path), str(tmp_path / "bin"), "gpt2", device="cpu", **files)
        found.append(lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True))
    assert found[0] == found[1]
    for (context, continuation), (log_likelihood, _) in zip(pairs, found[0], strict=True):
        symbols = lm.scorer.dictionary
        tokens = [symbols.index(str(byte)) for byte in (context + continuation).encode()]
        scored = len(continuation.encode())
        expected = plain_score(lm.scorer.model, tokens, scored, POSITIONS).log_likelihood
        assert log_likelihood == pytest.approx(expected, abs=1e-5)
    prompt = adapter.Prompt(lm, [EOS, *ids(lm, "caf")], 3, [])
    for token in ids(lm, "\u00e9 "):
        prompt.add(token)
    assert prompt.text == "\u00e9 "  # two bytes, then a space


def documented(program: str, places: dict[str, Path]) -> list[str]:
    """Return the flags behind a program in README.md, with other paths."""
    readme = (commands.EXAMPLES / "zero_shot" / "README.md").read_text()
    (line,) = [
        line
        for line in readme.replace("\\\n", " ").split("\n")
        if line.startswith("    " + program)
    ]
    flags = []
    for word in line.split()[len(program.split()) :]:
        for old, new in places.items():
            word = word.replace(old, str(new))
        flags.append(word)
    return flags


def run_harness(tmp_path: Path, *words: str) -> str:
    """Run the harness in a process of its own, and return what it prints."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *words, "--device", "cpu"],
        env=os.environ | environment | {"PYTHONPATH": str(commands.ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_documented_command(adapter: Any, folder: Path, tmp_path: Path) -> None:
    """In a process of its own, with the flags of README.md."""
    places = {
        "CKPT/checkpoint_best.pt": folder / "avgk" / "checkpoint_best.pt",
        "DATA-BIN": folder / "bin",
        "spm.model": folder / "spm.model",
        "runs/lm_eval": folder / "tasks",
        "RESULTS": tmp_path / "results",
    }
    flags = documented("python examples/zero_shot/lm_eval_adapter.py --model", places)
    printed = run_harness(tmp_path, str(PROGRAM), "--model", *flags)
    assert all(f"zero_shot_{task}" in printed for task in TASKS)
    (saved,) = (tmp_path / "results").rglob("results_*.json")
    assert len(json.loads(saved.read_text())["results"]) >= len(TASKS)


# The harness's own models, on exported folders


@pytest.fixture(scope="module")
def exported(adapter: Any, folder: Path) -> Path:
    """Export a model of the folder by the documented command."""
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[eval]'")
    places = {
        "CKPT/checkpoint_best.pt": folder / "avgk" / "checkpoint_last.pt",
        "DATA-BIN": folder / "bin",
        "spm.model": folder / "spm.model",
        "OUT": folder / "exported",
    }
    commands.sffn("export", *documented("fairseq-sffn export", places))
    return folder / "exported"


def test_the_harness_on_an_exported_folder(
    adapter: Any,
    folder: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The log-likelihoods and figures of ``fairseq-sffn zero-shot`` and of the adapter."""
    places = {
        "OUT": exported,
        "runs/lm_eval": folder / "tasks",
        "RESULTS": tmp_path / "results",
    }
    run_harness(tmp_path, "-m", "lm_eval", *documented("lm_eval", places), "--log_samples")
    (saved,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(saved.read_text())["results"]
    of_adapter = harness_results(load(adapter, folder), folder, tmp_path)
    report, scores = command_results(folder, "avgk", 4096, monkeypatch, capsys)
    for line in report["tasks"]:
        name = f"zero_shot_{line['task']}"
        (samples,) = (tmp_path / "results").rglob(f"samples_{name}_*.jsonl")
        documents = sorted(map(json.loads, samples.open()), key=lambda sample: sample["doc_id"])
        answers = [answer for document in documents for (answer,) in document["resps"]]
        found = [float(log_likelihood) for log_likelihood, _ in answers]
        assert found == pytest.approx(scores[line["task"]], rel=1e-6)
        expected = sorted(of_adapter["samples"][name], key=lambda sample: sample["doc_id"])
        others = [answer for document in expected for (answer,) in document["resps"]]
        assert found == pytest.approx([float(each) for each, _ in others], rel=1e-6)
        assert [str(hit) for _, hit in answers] == [str(hit) for _, hit in others]
        for metric in ("acc,none", "acc_norm,none", "perplexity,none", "acc_stderr,none"):
            value = of_adapter["results"][name].get(metric)
            assert results[name].get(metric) == (value and pytest.approx(value, rel=1e-6))


def test_generation_and_rolling_on_an_exported_folder(
    adapter: Any, folder: Path, exported: Path
) -> None:
    """As the adapter: texts up to a line break, and without a start token that is scored."""
    from lm_eval.models.huggingface import HFLM

    options = dict(pretrained=str(exported), trust_remote_code=True, device="cpu", batch_size=2)
    own, other = load(adapter, folder), HFLM(**options)
    with torch.no_grad():  # a trained model this small generates one word, whatever the context
        for name, parameter in own.scorer.model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.add_(torch.randn_like(parameter))
    other.model.load_state_dict(own.scorer.model.state_dict(), strict=False)
    other.model.generation_config.suppress_tokens = never(own)
    contexts = ["the", "the law of the people is", "the law of" * 9, "the law .\nthe", "war\n"]
    limits = {"max_gen_toks": 6, "until": ["\n"], "do_sample": False}
    requests = [(context, limits) for context in contexts]
    texts = [
        lm.generate_until(instances("generate_until", *requests), disable_tqdm=True)
        for lm in (own, other)
    ]
    assert len(set(texts[0])) > 2 and texts[0][:4] == texts[1][:4]
    # The harness decodes new tokens alone. At the beginning of a line, they have no other text.
    assert texts[0][4] == texts[1][4].removeprefix(" ")
    plain = HFLM(**options, add_bos_token=False)
    plain.model.load_state_dict(own.scorer.model.state_dict(), strict=False)
    rolling = instances("loglikelihood_rolling", ("the law",), ("the law\nof the " * 8,))
    found = plain.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert found == pytest.approx(own.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-6)
