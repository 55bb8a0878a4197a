"""The task's additions to fairseq's task: token counts, a check of the data, capacity at
evaluation."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import models
from fairseq.data import data_utils, indexed_dataset
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import OmegaConf

from fairseq_sffn.errors import UsageError
from fairseq_sffn.memory.selectors import hash_moe
from fairseq_sffn.memory.selectors.hash_layer import balanced_table
from fairseq_sffn.tasks import sffn_language_modeling
from fairseq_sffn.tasks.sffn_language_modeling import (
    SFFNLanguageModelingConfig,
    SFFNLanguageModelingTask,
)
from tests.models.small_lm import small_config


def set_up(
    data: Path | str, cls: type[LanguageModelingTask] = SFFNLanguageModelingTask, **options: Any
) -> LanguageModelingTask:
    elsewhere = dict(
        seed=1,
        batch_size=None,
        batch_size_valid=None,
        dataset_impl=None,
        data_buffer_size=10,
        tpu=False,
        use_plasma_view=False,
        plasma_path="/tmp/plasma",
    )
    options = {"tokens_per_sample": 16, "train_subset": "train", **options}
    config = SFFNLanguageModelingConfig(data=str(data), **elsewhere, **options)
    return cls.setup_task(OmegaConf.structured(config))


@pytest.fixture
def data(data_bin: Path, tmp_path: Path) -> Path:
    """Copy the corpus, for tests that spoil it."""
    return Path(shutil.copytree(data_bin, tmp_path / "bin"))


def write_split(folder: Path, name: str, *sentences: list[int]) -> None:
    """Write data for a dictionary of 10 types."""
    folder.mkdir(exist_ok=True)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(6)))
    builder = indexed_dataset.MMapIndexedDatasetBuilder(f"{folder / name}.bin", dtype=np.uint16)
    for sentence in sentences:
        builder.add_item(torch.tensor(sentence))
    builder.finalize(f"{folder / name}.idx")


def naive_counts(task: LanguageModelingTask, split: Path) -> list[int]:
    counts: Counter[int] = Counter()
    for sentence in data_utils.load_indexed_dataset(str(split), task.dictionary):
        counts.update(sentence.tolist())
    return [counts[token] for token in range(len(task.dictionary))]


# Token counts


def test_counts_of_the_dictionary(data_bin):
    task = set_up(data_bin)
    symbols = [line.split() for line in (data_bin / "dict.txt").read_text().splitlines()]
    specials = task.dictionary.nspecial
    assert task.token_counts()[specials:] == [int(count) for _, count in symbols]
    assert len(task.token_counts()) == len(symbols) + specials


@pytest.mark.parametrize("piece", [7, 10**9])
def test_counts_of_the_training_split(data_bin, piece, monkeypatch):
    monkeypatch.setattr(sffn_language_modeling, "CHECKED_TOKENS", piece)
    task = set_up(data_bin, hash_counts="train")
    counts = task.token_counts()
    assert counts == naive_counts(task, data_bin / "train")
    assert counts[task.dictionary.eos()] == 400  # sentences, which the dictionary does not count
    assert counts != list(set_up(data_bin).token_counts())


def test_counts_of_a_training_split_in_parts(tmp_path):
    write_split(tmp_path, "train", [4, 4, 2])
    write_split(tmp_path, "train1", [5, 4, 2])
    task = set_up(tmp_path, hash_counts="train")
    assert task.token_counts() == [0, 0, 2, 0, 3, 1, 0, 0, 0, 0]


def test_counts_of_a_training_split_in_folders(tmp_path):
    write_split(tmp_path / "first", "train", [4, 4, 2])
    write_split(tmp_path / "second", "train", [5, 4, 2])
    task = set_up(f"{tmp_path / 'first'}:{tmp_path / 'second'}", hash_counts="train")
    assert task.token_counts() == [0, 0, 2, 0, 3, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_counts_of_the_split_that_trains(data_bin, split):
    task = set_up(data_bin, hash_counts="train", train_subset=split)
    assert task.token_counts() == naive_counts(task, data_bin / split)


@pytest.mark.parametrize("split", ["train", "nosuch"])
def test_no_training_split_to_count(data, split):
    (data / "train.idx").unlink()
    told = rf"^--hash-counts train: {data} has no tokens of --train-subset {split} [^\n]+$"
    with pytest.raises(UsageError, match=told):
        set_up(data, hash_counts="train", train_subset=split).token_counts()


@pytest.mark.parametrize("hash_counts", ["dictionary", "train"])
def test_balanced_tables_are_made_of_the_counts(data_bin, hash_counts):
    task = set_up(data_bin, hash_counts=hash_counts)
    model = task.build_model(small_config("hash_layer", hash_table="balanced"))
    table = model.decoder.layers[1].fc1.memory.selector.table
    assert table.tolist() == balanced_table(task.token_counts(), 16).tolist()
    plain = set_up(data_bin, LanguageModelingTask)
    model = models.build_model(small_config("hash_layer", hash_table="balanced"), plain)
    other = model.decoder.layers[1].fc1.memory.selector.table
    assert (other.tolist() == table.tolist()) == (hash_counts == "dictionary")


@pytest.mark.parametrize("hash_counts", ["dictionary", "train"])
def test_tables_of_hash_moe_are_made_of_the_counts(data_bin, hash_counts, monkeypatch):
    seen, made = [], hash_moe.balanced_blocks

    def record(counts, *sizes):
        seen.append(list(counts))
        return made(counts, *sizes)

    monkeypatch.setattr(hash_moe, "balanced_blocks", record)
    task = set_up(data_bin, hash_counts=hash_counts)
    task.build_model(small_config("hash_moe"))
    assert seen == [list(task.token_counts())]
    of_dictionary = list(set_up(data_bin).token_counts())
    assert (seen == [of_dictionary]) == (hash_counts == "dictionary")


def test_a_loaded_model_needs_no_training_split(data):
    (data / "train.idx").unlink()
    task = set_up(data, hash_counts="train")
    task.build_model(small_config("hash_layer", hash_table="balanced"), from_checkpoint=True)


# Data of another dictionary


@pytest.mark.parametrize("split", ["train", "valid"])
def test_token_ids_outside_the_dictionary_are_refused(tmp_path, split):
    write_split(tmp_path, split, [4, 9, 2], [12, 10, 2])
    told = rf"^token id 12 in split {split} of {tmp_path}: [^\n]*dictionary of 10 types[^\n]*$"
    with pytest.raises(UsageError, match=told):
        set_up(tmp_path).load_dataset(split)


def test_every_part_of_the_epochs_folder_is_checked(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, part in ((first, "train"), (first, "train1"), (second, "train")):
        write_split(folder, part, [4, 9, 2])
    write_split(second, "train1", [4, 10, 2])
    task = set_up(f"{first}:{second}")
    task.load_dataset("train", epoch=1, combine=True)
    with pytest.raises(UsageError, match=r"^token id 10 in split train "):
        task.load_dataset("train", epoch=2, combine=True)


def test_the_data_of_the_dictionary_is_loaded(data_bin):
    ours, fairseqs = set_up(data_bin), set_up(data_bin, LanguageModelingTask)
    for split in ("train", "valid", "test"):
        ours.load_dataset(split)
        fairseqs.load_dataset(split)
        assert len(ours.dataset(split)) == len(fairseqs.dataset(split)) > 0
        for sample, expected in zip(ours.dataset(split), fairseqs.dataset(split), strict=True):
            assert sample["source"].tolist() == expected["source"].tolist()


def test_a_missing_split_is_fairseqs_error(data_bin):
    with pytest.raises(FileNotFoundError, match="nosuch"):
        set_up(data_bin).load_dataset("nosuch")


# Capacity at evaluation


@pytest.mark.parametrize(
    ("asked", "from_checkpoint", "expected"),
    [(1.5, True, 1.5), (0.0, True, 0.0), (None, True, 0.75), (None, False, 0.75)],
)
@pytest.mark.parametrize("method", ["avgk", "switch", "hash_layer"])
def test_capacity_at_evaluation(data_bin, method, asked, from_checkpoint, expected):
    task = set_up(data_bin, eval_capacity_factor=asked)
    config = small_config(method, sffn_capacity_factor=1.0, sffn_eval_capacity_factor=0.75)
    model = task.build_model(config, from_checkpoint=from_checkpoint)
    memory = model.memory_configs["layer1"]
    assert (memory.eval_capacity_factor, memory.capacity_factor) == (expected, 1.0)


def test_capacity_at_evaluation_is_not_for_training(data_bin):
    task = set_up(data_bin, eval_capacity_factor=1.5)
    with pytest.raises(UsageError, match=r"^--eval-capacity-factor 1\.5: [^\n]+$"):
        task.build_model(small_config("switch"))


def test_a_dense_model_has_no_capacity(data_bin):
    task = set_up(data_bin, eval_capacity_factor=1.5)
    with pytest.raises(UsageError, match=r"^--eval-capacity-factor 1\.5: [^\n]+$"):
        task.build_model(small_config("dense"), from_checkpoint=True)
    set_up(data_bin).build_model(small_config("dense"), from_checkpoint=True)
