"""What a command reads is looked at before it trains: splits, sentences, the best metric."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.data import data_utils
from fairseq.logging import metrics
from omegaconf import OmegaConf

from fairseq_sffn import splits
from fairseq_sffn.errors import UsageError
from fairseq_sffn.patches.training import check_metric
from fairseq_sffn.splits import check_splits
from tests import commands


def configuration(data: str, task: str = "language_modeling", **dataset: str) -> OmegaConf:
    """As much of a configuration as names data."""
    return OmegaConf.create({"task": {"_name": task, "data": data}, "dataset": dataset})


@pytest.fixture()
def folders(tmp_path: Path) -> Path:
    """Two folders of training data, of which the first has validation data too."""
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


def test_batches_of_no_sentence() -> None:
    lengths = torch.arange(4).numpy()
    assert len(data_utils.batch_by_size(lengths, None, lengths, 8)) == 2
    with pytest.raises(
        UsageError, match=r"^every sample of the data is longer than --max-tokens 8"
    ):
        data_utils.batch_by_size(lengths[:0], None, lengths, 8)


def test_a_split_of_one_batch_that_is_left_out(data_bin: Path, tmp_path: Path) -> None:
    """Of several thousand tokens, in fewer samples than a batch of 8."""
    flags = ("--tokens-per-sample", "1024", "--disable-validation")
    told = "^--required-batch-size-multiple 8: leaves out the only batch, of . sentences; give 1"
    with pytest.raises(UsageError, match=told):
        commands.train(data_bin, tmp_path, "dense", *flags)
    flags += ("--required-batch-size-multiple", "1", "--max-update", "1")
    assert commands.losses(commands.train(data_bin, tmp_path, "dense", *flags))


# The metric of the best checkpoint

ONE = ("--max-update", "1")


@pytest.mark.parametrize("criterion", ["sffn_cross_entropy", "cross_entropy"])
def test_a_metric_that_there_is_not(criterion: str, data_bin: Path, tmp_path: Path) -> None:
    """Stops before the first update, and says which there are."""
    flags = ("--best-checkpoint-metric", "nosuch", "--criterion", criterion, "--max-update", "9")
    with pytest.raises(UsageError) as stopped:
        commands.train(data_bin, tmp_path, "avgk", *flags)
    line = str(stopped.value)
    assert line.startswith("--best-checkpoint-metric nosuch: is none of those that validation ")
    assert " loss, " in line and " ppl" in line and "\n" not in line
    assert (" load_max, " in line) == (criterion == "sffn_cross_entropy")
    assert not list(tmp_path.iterdir())


def test_a_metric_that_is_never_asked_for(data_bin: Path, tmp_path: Path) -> None:
    flags = ("--best-checkpoint-metric", "nosuch", "--disable-validation")
    assert commands.losses(commands.train(data_bin, tmp_path, "avgk", *ONE, *flags))


@pytest.mark.parametrize("model", ["avgk", "gshard"])
def test_training_goes_on_as_without_the_look(model: str, data_bin: Path, tmp_path: Path) -> None:
    """Losses and checkpoints are those of the default metric."""
    logs = {
        metric: commands.train(
            *(data_bin, tmp_path / metric, model, "--best-checkpoint-metric", metric),
            *("--max-update", "4", "--validate-interval-updates", "2", "--dropout", "0.1"),
        )
        for metric in ("loss", "ppl")
    }
    losses = [commands.losses(log) for log in logs.values()]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    validations = [
        [
            {k: v for k, v in record.items() if "best" not in k and not k.endswith("wps")}
            for record in commands.records(log, "valid")
        ]
        for log in logs.values()
    ]
    assert validations[0] == validations[1] and len(validations[0]) == 2
    states = [torch.load(tmp_path / metric / "checkpoint_last.pt") for metric in logs]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
    best = torch.load(tmp_path / "ppl" / "checkpoint_best.pt")["extra_state"]["best"]
    assert best == pytest.approx(float(validations[1][-1]["valid_ppl"]))


def test_the_look_leaves_nothing_behind(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the meters of training, nor in the batch of ranks that have no sentences."""
    looks = []

    def look(cfg: Any, trainer: Any, *args: Any) -> None:
        trainer.reset_dummy_batch(batch := {"of": "the test"})
        before = set(metrics.get_meters("default") or ())
        check_metric(cfg, trainer, *args)
        after = set(metrics.get_meters("default") or ())
        looks.append((before == after, trainer._dummy_batch is batch))

    monkeypatch.setattr(splits, "check_metric", look)
    flags = ("--best-checkpoint-metric", "ppl", "--batch-size", "100", "--max-update", "9")
    log = commands.train(data_bin, tmp_path, "avgk", *flags, "--required-batch-size-multiple", "1")
    assert looks == [(True, True)]  # once for all epochs
    assert {int(record["epoch"]) for record in commands.records(log)} >= {1, 2}
