"""Batches that fairseq's tasks make."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.data import MonolingualDataset
from fairseq.tasks import FairseqTask

from fairseq_sffn.errors import UsageError
from tests import commands


class Sentences(MonolingualDataset):
    """The part of a data set that has sizes."""

    def __init__(self, *lengths: int) -> None:
        super().__init__(
            [torch.ones(n) for n in lengths], torch.tensor(lengths).numpy(), None, None
        )  # type: ignore[arg-type]


def task_with(dataset: Any, name: str = "train") -> FairseqTask:
    task = FairseqTask(None)
    task.datasets[name] = dataset
    return task


@pytest.mark.parametrize("multiple", [1, 8])
def test_batches_of_no_sentence(multiple: int) -> None:
    few, long = Sentences(1, 2, 3), Sentences(9, 10)
    arguments = {"max_tokens": 8, "max_positions": 8, "ignore_invalid_inputs": True}
    arguments["required_batch_size_multiple"] = multiple
    kept = task_with(few).get_batch_iterator(few, **{**arguments, "max_sentences": 2})
    assert len(kept.frozen_batches) == (2 if multiple == 1 else 1)
    told = r"^every sample of the data is longer than --max-tokens 8 or the model's positions"
    for name in ("train", "valid"):
        with pytest.raises(UsageError, match=told):
            task_with(long, name).get_batch_iterator(long, **arguments)
    empty = Sentences()
    with pytest.raises(UsageError, match=told):
        task_with(empty).get_batch_iterator(empty, **{**arguments, "max_positions": None})


def test_a_callers_own_data_may_be_empty() -> None:
    """fairseq-interactive continues after it skips a line."""
    long = Sentences(9, 10)
    found = FairseqTask(None).get_batch_iterator(
        long, max_tokens=8, max_positions=8, ignore_invalid_inputs=True
    )
    assert found.frozen_batches == ()


def test_a_split_of_one_batch_that_is_left_out(data_bin: Path, tmp_path: Path) -> None:
    """The batch has several thousand tokens, but fewer samples than a batch of 8."""
    flags = ("--tokens-per-sample", "1024", "--disable-validation")
    told = "^--required-batch-size-multiple 8: leaves out the only batch, of . sentences; give 1"
    with pytest.raises(UsageError, match=told):
        commands.train(data_bin, tmp_path, "dense", *flags)
    flags += ("--required-batch-size-multiple", "1", "--max-update", "1")
    assert commands.losses(commands.train(data_bin, tmp_path, "dense", *flags))
