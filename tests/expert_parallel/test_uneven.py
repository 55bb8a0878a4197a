"""Processes with different amounts of work: missing micro-batches in training, and different
numbers of decoding steps in validation."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests import commands
from tests.expert_parallel import launch

UPDATES = 4
FLAGS = (
    *launch.SAME_SENTENCES,
    *("--max-update", f"{UPDATES}", "--required-batch-size-multiple", "1", "--batch-size", "4"),
    *("--sample-break-mode", "eos", "--no-save", "--disable-validation"),
)
LETTERS = "abcdefgh"


def preprocess(folder: Path, lines: dict[str, int], *flags: str) -> Path:
    """Binarise sentences of different lengths."""
    rng = random.Random(0)
    source = "--only-source" in flags
    for split, count in lines.items():
        texts = [" ".join(rng.choices(LETTERS, k=rng.randint(2, 12))) for _ in range(count)]
        for suffix in ("",) if source else (".word", ".back"):
            (folder / f"{split}{suffix}").write_text("\n".join(texts) + "\n")
    prefixes = [arg for split in lines for arg in (f"--{split}pref", folder / split)]
    commands.run("preprocess", *flags, *prefixes, "--workers", "1", "--destdir", folder / "bin")
    return folder / "bin"


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make 7 batches for two processes that take two per update. Only one process has a last
    batch."""
    folder = tmp_path_factory.mktemp("sentences")
    return preprocess(folder, {"train": 27, "valid": 4}, "--only-source")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    languages = ("--source-lang", "word", "--target-lang", "back")
    return preprocess(folder, {"train": 16, "valid": 6}, *languages)


@pytest.fixture(scope="module")
def together(
    sentences: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("together")
    jobs = {}
    for shards in ("1", "2"):
        flags = (*FLAGS, "--update-freq", "2", "--sffn-expert-parallel", shards)
        jobs[shards] = launch.training(sentences, folder / shards, "avgk", *flags)
    jobs["decoding"] = [
        *(str(pairs), "--user-dir", commands.USER_DIR, "--task", "translation", "--cpu"),
        *("--arch", "transformer_sffn", "--sffn-selector", "switch"),
        *("--encoder-layers", "2", "--decoder-layers", "2"),
        *("--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "32"),
        *("--encoder-attention-heads", "2", "--decoder-attention-heads", "2"),
        *("--criterion", "sffn_cross_entropy", "--optimizer", "adam", "--lr", "1e-3"),
        *("--batch-size", "1", "--max-update", "1", "--no-save", "--num-workers", "0"),
        *("--log-format", "json", "--no-progress-bar", "--save-dir", str(folder / "decoding")),
        *("--eval-bleu", "--eval-bleu-detok", "space"),
        *("--eval-bleu-args", '{"beam": 1, "max_len_a": 1, "max_len_b": 2}'),
    ]
    return launch.train(2, folder, jobs)


def logged(log: str) -> list[dict[str, Any]]:
    return commands.records(log)


@pytest.mark.parametrize("shards", ["1", "2"])
def test_each_micro_batch_counts_by_itself(shards, sentences, together, tmp_path):
    want = logged(commands.train(sentences, tmp_path, "avgk", *FLAGS, "--update-freq", "4"))
    got = logged(together[shards])
    assert len(got) == len(want) == UPDATES
    assert len({record["wpb"] for record in want}) > 1
    for record, reference in zip(got, want, strict=True):
        for key in ("wpb", "bsz"):
            assert record[key] == reference[key], key
        for key in ("loss", "gnorm", "load_max", "load_entropy"):
            assert float(record[key]) == pytest.approx(float(reference[key]), abs=5e-3), key
        # Dummy batches are sent too.
        assert ("sent_bytes" in record) == (shards == "2")


def test_decoding_in_validation(together):
    """Nothing reads the losses of decoded tokens. Processes would wait for each other to form
    them."""
    assert "valid_bleu" in commands.records(together["decoding"], "valid")[-1]
