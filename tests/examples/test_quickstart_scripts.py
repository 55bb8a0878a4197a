"""examples/quickstart.sh with programs that do nothing, and the scripts of examples/quickstart on
small synthetic data, in process."""

from __future__ import annotations

import importlib.util
import itertools
import json
import lzma
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from unittest.mock import create_autospec

import numpy as np
import pytest
import sentencepiece
import torch
from fairseq.data import Dictionary, indexed_dataset
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

SCRIPTS = Path(__file__).parents[2] / "examples" / "quickstart"
WORDS = ["union", "congress", "law", "peace", "war", "tariff", "people", "nation", "£", "naïve"]


def load_script(name: str) -> ModuleType:
    """Import a script by its path, as examples/ is not a package."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    return load_script("prepare")


@pytest.fixture(scope="module")
def ngram() -> ModuleType:
    return load_script("ngram")


@pytest.fixture(scope="module")
def report(ngram: ModuleType) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ngram", ngram)
        return load_script("report")


# quickstart.sh


def run_quickstart(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run quickstart.sh in a folder with programs that do nothing. It knows the models dense, avgk
    and switch."""
    (folder / "examples" / "quickstart").mkdir(parents=True)
    (folder / "examples" / "venv.sh").touch()
    for name in ("quickstart.sh", "requirements.txt", "quickstart/prepare.py"):
        shutil.copy(SCRIPTS.parent / name, folder / "examples" / name)
    programs = folder / "programs"
    programs.mkdir()
    for name in ("python", "fairseq-preprocess", "fairseq-train", "fairseq-sffn"):
        (programs / name).write_text(
            "#!/bin/sh\n"
            'case "$*" in *METHODS*) echo dense avgk switch; exit ;; esac\n'
            "cat >/dev/null\n"
        )
        (programs / name).chmod(0o755)
    return subprocess.run(
        ["bash", folder / "examples" / "quickstart.sh"],
        env={"PATH": f"{programs}:{os.environ['PATH']}", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("updates", "interval"), [(900, 113), (800, 100), (200, 100), (1, 100)])
def test_a_short_training_is_not_mostly_validation(
    updates: int, interval: int, tmp_path: Path
) -> None:
    process = run_quickstart(
        tmp_path, QUICKSTART_UPDATES=str(updates), QUICKSTART_MODELS="dense avgk"
    )
    assert process.returncode == 0, process.stderr
    for model in ("dense", "avgk"):
        command = (tmp_path / "runs" / "quickstart" / model / "command.txt").read_text()
        assert f" --max-update {updates} " in command
        assert f" --save-interval-updates {interval} " in command


def test_quickstart_trains_all_models(tmp_path: Path) -> None:
    process = run_quickstart(tmp_path, QUICKSTART_MODELS="all")
    assert process.returncode == 0, process.stderr
    trained = sorted(path.parent.name for path in tmp_path.glob("runs/quickstart/*/command.txt"))
    assert trained == ["avgk", "dense", "switch"]
    assert "== dense avgk (3 of 3 models left)" in process.stdout
    assert "== switch (1 of 3 models left)" in process.stdout


@pytest.mark.parametrize("models", ["dense none", "allo", "den", "dense all"])
def test_quickstart_refuses_unknown_models_before_it_starts(models: str, tmp_path: Path) -> None:
    process = run_quickstart(tmp_path, QUICKSTART_MODELS=models)
    unknown = models.split()[-1]
    expected = f"QUICKSTART_MODELS: {unknown} is none of dense, avgk, switch\n"
    assert (process.returncode, process.stdout, process.stderr) == (1, "", expected)


# progress.py


def test_progress_tells_the_time_left() -> None:
    progress = load_script("progress").Progress(updates=100)
    record = {"ppl": "9.5", "wpb": "2000", "num_updates": "20", "wps": "1000"}
    first = progress.summary(log_line("train_inner", **record))
    # 2 seconds an update, and then 4, of which the mean is 3
    second = progress.summary(
        log_line("train_inner", **{**record, "num_updates": "60", "wps": "500"})
    )
    assert first == "update 20/100: perplexity 9.5, 1,000 tokens/s, 2:40 left"
    assert second == "update 60/100: perplexity 9.5, 500 tokens/s, 2:00 left"
    valid = progress.summary(log_line("valid", valid_num_updates="60", valid_ppl="8"))
    assert valid == "update 60: valid perplexity 8"
    assert progress.summary(log_line("train", train_wps="7")) is None
    assert progress.summary("no record\n") is None


# prepare.py


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + rng.choice(".?!")


def make_documents(count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(sentence(rng) for _ in range(rng.randint(3, 30))) for _ in range(count)]


def write_collection(path: Path, documents: list[str]) -> Path:
    text = "".join(f"== {1790 + i}_name\n{document}\n\n" for i, document in enumerate(documents))
    path.write_bytes(lzma.compress(text.encode()))
    return path


def run_prepare(prepare: ModuleType, source: Path, output: Path, *flags: str) -> Path:
    prepare.main(["--input", str(source), "--output", str(output), "--vocab-size", "360", *flags])
    return output


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_splits_are_disjoint_complete_and_of_the_right_size(prepare: ModuleType) -> None:
    documents = make_documents(300)
    splits = prepare.split_documents(documents, seed=3)

    assert sorted(itertools.chain(*splits.values())) == sorted(documents)
    total = sum(map(len, documents))
    for split in ("valid", "test"):
        assert sum(map(len, splits[split])) / total == pytest.approx(0.03, abs=0.01)
        places = [documents.index(document) for document in splits[split]]
        assert places == sorted(places)
        assert places[0] < 100 < 200 < places[-1]  # from all over the collection


def test_splits_depend_on_the_seed_alone(prepare: ModuleType) -> None:
    documents = make_documents(60)
    assert prepare.split_documents(documents, 1) == prepare.split_documents(documents, 1)
    assert prepare.split_documents(documents, 1) != prepare.split_documents(documents, 2)


def test_copies_are_dropped(prepare: ModuleType, tmp_path: Path) -> None:
    first, second = make_documents(2)
    copy = first.replace(" ", "\n ")
    source = write_collection(tmp_path / "c.xz", [first, second, copy])
    assert prepare.read_documents(source) == ([first, second], 1)


def test_sentences(prepare: ModuleType) -> None:
    text = "Is it so? It is, Mr. Speaker. In 3.5 years e.g. here! Then."
    lines = ["Is it so?", "It is, Mr. Speaker.", "In 3.5 years e.g. here!", "Then."]
    assert prepare.split_sentences(text) == lines

    endless = "word-word " * 700 + "end."
    lines = prepare.split_sentences(endless)
    assert max(map(len, lines)) <= 2000
    assert " ".join(lines) == endless


def test_prepare_loses_nothing_and_is_reproducible(prepare: ModuleType, tmp_path: Path) -> None:
    documents = make_documents(60)
    held_out = prepare.split_documents(documents, 1)["valid"][0]
    documents[documents.index(held_out)] = held_out.replace("union", "ωμέγα")  # same length
    source = write_collection(tmp_path / "c.xz", documents)
    output = run_prepare(prepare, source, tmp_path / "a", "--seed", "1")

    dictionary = Dictionary.load(str(output / "dict.txt"))
    assert len(dictionary) == 360
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(output / "spm.model"))
    sentences = []
    for split in ("train", "valid", "test"):
        lines = (output / f"{split}.txt").read_text().splitlines()
        pieces = [line.split() for line in (output / f"{split}.bpe").read_text().splitlines()]
        assert tokenizer.decode(pieces) == lines
        assert all(dictionary.index(p) != dictionary.unk() for line in pieces for p in line)
        sentences += lines
    counts = Counter((output / "train.bpe").read_text().split())
    assert [counts[s] for s in dictionary.symbols[4:]] == dictionary.count[4:]
    assert Counter(sentences) == Counter(s for d in documents for s in prepare.split_sentences(d))
    assert "ωμέγα" in (output / "valid.txt").read_text()

    again = run_prepare(prepare, source, tmp_path / "b", "--seed", "1")
    assert contents(again) == contents(output)
    other = run_prepare(prepare, source, tmp_path / "c", "--seed", "2")
    assert contents(other) != contents(output)


@pytest.mark.parametrize(
    "data",
    [
        None,
        b"not xz",
        lzma.compress(b"no header"),
        lzma.compress(b"\xff"),
        lzma.compress(b"== a\nOne.\n== b\nTwo.\n"),
    ],
)
def test_prepare_refuses_bad_input(prepare: ModuleType, tmp_path: Path, data: bytes | None) -> None:
    source = tmp_path / "c.xz"
    if data is not None:
        source.write_bytes(data)
    with pytest.raises(SystemExit, match=r"\A--input .*c\.xz.*\Z"):  # no newline in it
        run_prepare(prepare, source, tmp_path / "out")


@pytest.mark.parametrize("vocab_size", ["-1", "0", "280", "1000000"])
def test_prepare_refuses_bad_vocabulary(
    prepare: ModuleType, tmp_path: Path, vocab_size: str
) -> None:
    source = write_collection(tmp_path / "c.xz", make_documents(60))
    with pytest.raises(SystemExit, match=rf"\A--vocab-size {vocab_size}: .*\Z"):
        run_prepare(prepare, source, tmp_path / "out", "--vocab-size", vocab_size)
    assert not list((tmp_path / "out").iterdir())


# ngram.py


@pytest.fixture(scope="module")
def binarised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Binarise a small random language with tokens that train never has."""
    directory = tmp_path_factory.mktemp("bin")
    dictionary = Dictionary()
    for symbol in "abcdefghij":
        dictionary.add_symbol(symbol)
    dictionary.save(str(directory / "dict.txt"))
    rng = random.Random(0)
    for split, lines, symbols in (
        ("train", 60, "abcdefgh"),
        ("valid", 9, "abcdefghi"),
        ("test", 7, "hgfj"),
    ):
        builder = indexed_dataset.make_builder(
            str(directory / f"{split}.bin"), impl="mmap", vocab_size=len(dictionary)
        )
        for _ in range(lines):
            line = " ".join(sorted(rng.choices(symbols, k=rng.randint(1, 8))))
            builder.add_item(dictionary.encode_line(line, add_if_not_exist=False))
        builder.finalize(str(directory / f"{split}.idx"))
    return directory


def lm_pairs(data: Path, split: str) -> list[tuple[int, int]]:
    """Return the (previous token, target) pairs that fairseq's language modelling task scores, in
    order."""
    config = LanguageModelingConfig(data=str(data), tokens_per_sample=7)
    config.use_plasma_view, config.dataset_impl = False, None  # they refer to other configs
    task = LanguageModelingTask.setup_task(config)
    task.load_dataset(split)
    samples = [task.dataset(split)[i] for i in range(len(task.dataset(split)))]
    return [
        pair
        for s in samples
        for pair in zip(s["source"].tolist(), s["target"].tolist(), strict=True)
    ]


def naive_ppl(
    train: list[tuple[int, int]], targets: list[tuple[int, int]], size: int, discount: float | None
) -> float:
    """Compute perplexity in plain loops, for the unigram model if `discount` is None."""
    tokens, pairs = Counter(t for _, t in train), Counter(train)
    total = 0.0
    for context, target in targets:
        prob = (tokens[target] + 1) / (len(train) + size)
        seen = sum(n for (c, _), n in pairs.items() if c == context)
        if discount is not None and seen:
            followers = sum(c == context for c, _ in pairs)
            kept = max(pairs[context, target] - discount, 0)
            prob = kept / seen + discount * followers / seen * prob
        total -= math.log2(prob)
    return 2 ** (total / len(targets))


def test_ngrams_score_the_tokens_that_fairseq_scores(ngram: ModuleType, binarised: Path) -> None:
    dictionary = Dictionary.load(str(binarised / "dict.txt"))
    for split in ("train", "valid", "test"):
        tokens = ngram.read_tokens(binarised, split, dictionary)
        previous = ngram.contexts(tokens, dictionary.eos())
        pairs = list(zip(previous.tolist(), tokens.tolist(), strict=True))
        assert pairs == lm_pairs(binarised, split)


def test_ngrams_equal_plain_loops(ngram: ModuleType, binarised: Path, tmp_path: Path) -> None:
    size = 14
    train, valid, test = (lm_pairs(binarised, split) for split in ("train", "valid", "test"))
    discount = min(np.arange(1, 100) / 100, key=lambda d: naive_ppl(train, valid, size, d))

    ngram.main(["--data", str(binarised), "--output", str(tmp_path / "ngram.json")])
    unigram, bigram = json.loads((tmp_path / "ngram.json").read_text())

    assert (unigram["arch"], bigram["arch"]) == ("unigram", "bigram")
    assert unigram["valid_ppl"] == pytest.approx(naive_ppl(train, valid, size, None), rel=1e-12)
    assert unigram["test_ppl"] == pytest.approx(naive_ppl(train, test, size, None), rel=1e-12)
    assert bigram["valid_ppl"] == pytest.approx(naive_ppl(train, valid, size, discount), rel=1e-12)
    assert bigram["test_ppl"] == pytest.approx(naive_ppl(train, test, size, discount), rel=1e-12)


def test_bigram_probabilities_sum_to_one(ngram: ModuleType, binarised: Path) -> None:
    size, eos = 14, 2
    dictionary = Dictionary.load(str(binarised / "dict.txt"))
    train = ngram.read_tokens(binarised, "train", dictionary)
    for context in (eos, dictionary.index("c"), dictionary.index("j")):  # train has no j
        targets = np.stack([np.full(size, context), np.arange(size)], axis=1).ravel()
        probs = ngram.bigram_terms(train, targets, size, eos).probs(0.4)[1::2]
        assert probs.sum() == pytest.approx(1, rel=1e-12)


def test_ngram_refuses_a_directory_without_data(ngram: ModuleType, tmp_path: Path) -> None:
    argv = ["--data", str(tmp_path), "--output", str(tmp_path / "ngram.json")]
    with pytest.raises(SystemExit, match=r"^--data .*dict\.txt"):
        ngram.main(argv)
    Dictionary().save(str(tmp_path / "dict.txt"))
    with pytest.raises(SystemExit, match=r"^--data .*`train`"):
        ngram.main(argv)


# report.py

LOAD = {"valid_load_max": "2.1", "valid_unused_blocks": "3", "valid_load_entropy": "0.93"}


def log_line(kind: str, **values: object) -> str:
    return f"2026-11-24 00:00:00 | INFO | {kind} | {json.dumps(values)}\n"


def make_run(directory: Path, arch: str, load: dict[str, str]) -> None:
    """Make a run of 300 updates whose best checkpoint has update 200."""
    log = "2026-11-24 00:00:00 | INFO | fairseq_cli.train | {'_name': None}\n"
    for update, wps, ppl in ((100, "10", "90.5"), (200, "1200", "50.25"), (300, "1000", "60")):
        log += log_line(
            "train_inner", epoch=1, loss="6", ppl="64", wps=wps, num_updates=str(update)
        )
        values = {"valid_loss": "6.9", "valid_ppl": ppl, "valid_num_updates": str(update)}
        later = dict.fromkeys(load, "9")
        log += log_line("valid", epoch=1, **values, **(load if update == 200 else later))
        log += log_line("train", epoch=1, train_wps="7", train_num_updates=str(update))
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "train.log").write_text(log)
    sets = {"runs/bin:valid": {"perplexity": 50.27}, "runs/bin:test": {"perplexity": 55.5}}
    routing = {"routing": {"1": {"counts": [4, 0, 8]}, "3": {"counts": [1, 1, 1]}}} if load else {}
    (directory / "evaluation.json").write_text(json.dumps({"sets": sets, **routing}))
    checkpoint = {
        "cfg": {"model": {"_name": arch}, "common": {"seed": 7}},
        "optimizer_history": [{"num_updates": 200}],
        "model": {"weight": torch.zeros(2)},
    }
    torch.save(checkpoint, directory / "checkpoints" / "checkpoint_best.pt")


@pytest.fixture
def runs(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make two finished runs, and a fixed cost for every model."""
    make_run(tmp_path / "dense", "transformer_lm_dense_tiny", {})
    make_run(tmp_path / "avgk", "transformer_lm_avgk_tiny", LOAD)
    (tmp_path / "avgk" / "command.txt").write_text("fairseq-train data --seed 7\n")

    costs = {"params": 1_500_000, "active_params": 900_000, "flops_per_token": 1_800_000}
    checkpoint_cost = create_autospec(report.checkpoint_cost, return_value=costs)
    monkeypatch.setattr(report, "checkpoint_cost", checkpoint_cost)
    return tmp_path


def run_report(report: ModuleType, runs: Path, data: Path) -> None:
    report.main(["--runs", str(runs), "--data", str(data), "--models", "dense", "avgk"])


def test_block_load_is_sorted_and_relative_to_the_mean(report: ModuleType) -> None:
    counts = {"dense": {}, "avgk": {"1": [4, 0, 8], "3": [1, 1, 1]}, "switch": {"1": [3, 3]}}
    first, second = report.block_load_figure(counts).axes
    (loads, edges, _), (others, _, _) = (patch.get_data() for patch in first.patches)
    assert loads.tolist() == [2, 1, 0] and others.tolist() == [1, 1]
    assert edges.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [patch.get_label() for patch in first.patches] == ["avgk", "switch"]
    assert [patch.get_label() for patch in second.patches] == ["avgk"]


def test_report(
    report: ModuleType,
    ngram: ModuleType,
    runs: Path,
    binarised: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_report(report, runs, binarised)

    unigram, bigram, dense, avgk = json.loads((runs / "results.json").read_text())
    assert avgk == {
        "arch": "transformer_lm_avgk_tiny",
        "name": "avgk",
        "params": 1_500_000,
        "active_params": 900_000,
        "flops_per_token": 1_800_000,
        "valid_ppl": 50.27,
        "test_ppl": 55.5,
        "tokens_per_second": 1100.0,
        "load_max": 2.1,
        "unused_blocks": 3.0,
        "load_entropy": 0.93,
        "updates": 300,
        "seed": 7,
        "command": "fairseq-train data --seed 7",
    }
    assert dense["arch"] == "transformer_lm_dense_tiny"
    nothing = dict.fromkeys(("load_max", "unused_blocks", "load_entropy", "command"))
    assert nothing.items() <= dense.items()
    for row, expected in zip((unigram, bigram), ngram.ngram_rows(binarised), strict=True):
        assert row.keys() == avgk.keys()
        assert expected.items() <= row.items()
        assert row["params"] is None

    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["model", "unigram", "bigram", "dense", "avgk"]
    assert len({len(line) for line in table}) == 1
    figures = "1,500,000  900,000  1,800,000  50.27  55.50  1,100  2.10  3"
    assert table[4].split()[1:] == figures.split()
    assert table[3].split()[-2:] == ["-", "-"]

    for name in ("perplexity", "block_load"):
        assert (runs / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(runs.glob("*.tmp"))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("avgk/evaluation.json", None),
        ("avgk/evaluation.json", "Traceback\n"),
        ("avgk/evaluation.json", '{"sets": {"runs/bin:valid": {"perplexity": 5}}}'),
        ("avgk/train.log", ""),
        ("avgk/train.log", log_line("train_inner", wps="1", num_updates="1")),
    ],
)
def test_report_refuses_incomplete_runs_in_one_line(
    report: ModuleType, runs: Path, binarised: Path, path: str, text: str | None
) -> None:
    if text is None:
        (runs / path).unlink()
    else:
        (runs / path).write_text(text)
    with pytest.raises(SystemExit, match=f"^--models avgk: .*{path}"):
        run_report(report, runs, binarised)
    assert not (runs / "results.json").exists()
