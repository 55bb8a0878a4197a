"""``fairseq-eval-lm`` evaluates at the positions that a model has."""

import inspect
from pathlib import Path

import pytest
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask

from tests import commands


@pytest.fixture(scope="module")
def checkpoint(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train at 16 tokens per sample."""
    folder = tmp_path_factory.mktemp("checkpoint")
    commands.train(data_bin, folder, "avgk")
    return folder / "checkpoint_last.pt"


@pytest.mark.parametrize(("asked", "split"), [("1024", "valid"), ("17", "test")])
def test_evaluation_at_the_context_of_the_model(
    asked: str, split: str, data_bin: Path, checkpoint: Path
) -> None:
    flags = ("--gen-subset", split, "--tokens-per-sample", asked)
    log = commands.apply("eval-lm", data_bin, checkpoint, *flags)
    assert f"--tokens-per-sample {asked}: the model has 16 positions; evaluating at 16" in log
    fitting = (*flags, "--tokens-per-sample", "16")
    expected = commands.apply("eval-lm", data_bin, checkpoint, *fitting)
    assert "evaluating at" not in expected
    assert commands.perplexity(log) == commands.perplexity(expected)


def test_shorter_evaluation_is_left_alone(data_bin: Path, checkpoint: Path) -> None:
    flags = ("--gen-subset", "valid", "--tokens-per-sample", "8")
    log = commands.apply("eval-lm", data_bin, checkpoint, *flags)
    assert "evaluating at" not in log and "valid 45 examples" in log


def test_context_window(data_bin: Path, checkpoint: Path) -> None:
    """Samples have 8 new tokens with 8 of context. Two sets of flags ask for that."""
    window = ("--gen-subset", "valid", "--context-window", "8")
    asked = commands.apply("eval-lm", data_bin, checkpoint, *window, "--tokens-per-sample", "16")
    cut = commands.apply("eval-lm", data_bin, checkpoint, *window, "--tokens-per-sample", "1024")
    assert commands.perplexity(asked) == commands.perplexity(cut)
    assert commands.perplexity(asked) != commands.evaluate(data_bin, checkpoint)


def test_fairseq_itself_would_evaluate_nothing(
    data_bin: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in (
        (LanguageModelingTask, "eval_lm_dataloader"),
        (FairseqTask, "get_batch_iterator"),
    ):
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    log = commands.apply("eval-lm", data_bin, checkpoint, "--tokens-per-sample", "1024")
    assert commands.perplexity(log) == 1.0
