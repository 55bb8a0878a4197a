"""The splits that a command names are looked for before it begins."""

import shutil
from pathlib import Path

import pytest
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import OmegaConf

from fairseq_sffn.errors import UsageError
from fairseq_sffn.options.splits import check_splits
from tests import commands


def configuration(data: str, task: str = "language_modeling", **dataset: str) -> OmegaConf:
    """Make the part of a configuration that names data."""
    return OmegaConf.create({"task": {"_name": task, "data": data}, "dataset": dataset})


@pytest.fixture()
def folders(tmp_path: Path) -> Path:
    """Make two folders of training data. Only the first has validation data."""
    for name in ("a/train.idx", "a/valid.idx", "b/train.idx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_training_data_is_in_every_folder_and_other_data_in_the_first(folders: Path) -> None:
    splits = {"train_subset": "train", "valid_subset": "valid"}
    both, turned = f"{folders}/a:{folders}/b", f"{folders}/b:{folders}/a"
    check_splits(configuration(both, **splits), *splits)
    with pytest.raises(
        UsageError, match=r"^--valid-subset valid: there is no split valid in .*/b$"
    ):
        check_splits(configuration(turned, **splits), *splits)
    (folders / "b/train.idx").unlink()
    with pytest.raises(
        UsageError, match=r"^--train-subset train: there is no split train in .*/b$"
    ):
        check_splits(configuration(both, **splits), *splits)


@pytest.mark.parametrize("file", ["test", "test.idx", "test.de-en.de.idx"])
def test_every_format_of_a_split_is_known(file: str, tmp_path: Path) -> None:
    cfg = configuration(str(tmp_path), "translation", gen_subset="test")
    (tmp_path / f"more{file}").touch()
    with pytest.raises(UsageError, match=r"^--gen-subset test: "):
        check_splits(cfg, "gen_subset")
    (tmp_path / file).touch()
    check_splits(cfg, "gen_subset")


def test_tasks_that_read_other_files_are_left_alone() -> None:
    check_splits(configuration("nowhere", "masked_lm", train_subset="x"), "train_subset")


def test_validation_data_that_is_not_named(data_bin: Path, tmp_path: Path) -> None:
    data = shutil.copytree(data_bin, tmp_path / "data")
    for kind in ("idx", "bin"):
        shutil.copy(data / f"valid.{kind}", data / f"valid1.{kind}")
    with pytest.raises(UsageError, match=r"^--valid-subset valid: Valid paths .* --combine-val"):
        commands.train(data, tmp_path / "saved", "dense")
    commands.train(data, tmp_path / "saved", "dense", "--max-update", "1", "--combine-val")


def test_tasks_of_other_plugins_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may read other files."""
    theirs = type("Theirs", (LanguageModelingTask,), {"__module__": "their_plugin.tasks"})
    monkeypatch.setitem(TASK_REGISTRY, "theirs", theirs)
    check_splits(configuration("nowhere", "theirs", train_subset="x"), "train_subset")
