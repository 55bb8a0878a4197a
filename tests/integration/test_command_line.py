"""fairseq's commands on every model: train, evaluate, generate, continue a prompt."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import commands
from tests.commands import losses
from tests.integration.flags import EVERY_SAMPLE, MODELS, SENTENCES
from tests.integration.outputs import hypotheses, valid_ppl


@dataclass
class Trained:
    model: str
    log: str
    checkpoint: Path


@pytest.fixture(scope="module", params=[*MODELS, "mixed"])
def trained(
    request: pytest.FixtureRequest, data_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    save_dir = tmp_path_factory.mktemp(request.param)
    flags = (*EVERY_SAMPLE, "--validate-interval-updates", "3")
    log = commands.train(data_bin, save_dir, request.param, *flags)
    return Trained(request.param, log, save_dir / "checkpoint_last.pt")


def test_training_learns(trained: Trained) -> None:
    first, *_, last = losses(trained.log).values()
    assert float(last) < float(first) - 0.5


def test_eval_lm_finds_the_perplexity_that_training_logged(
    trained: Trained, data_bin: Path
) -> None:
    found = commands.evaluate(data_bin, trained.checkpoint)
    assert found == pytest.approx(valid_ppl(trained.log), abs=0.01)


def test_generation_scores_sentences_as_eval_lm_does(trained: Trained, data_bin: Path) -> None:
    """Generation decodes token by token. It is made to repeat the sentences of the split."""
    evaluated = commands.evaluate(data_bin, trained.checkpoint, *SENTENCES)
    output = commands.apply(
        *("generate", data_bin, trained.checkpoint, *SENTENCES, "--gen-subset", "valid"),
        *("--batch-size", "16", "--beam", "2", "--max-len-b", "8"),
    )
    scores = [score for _, scores in hypotheses(output).values() for score in scores]
    assert len(scores) == 40 * 9
    assert 2 ** (-sum(scores) / len(scores)) == pytest.approx(evaluated, abs=0.01)


def test_interactive_continues_each_prompt(trained: Trained, data_bin: Path) -> None:
    output = commands.apply(
        *("interactive", data_bin, trained.checkpoint, "--task", "language_modeling"),
        *("--max-len-b", "12"),
        stdin="the n2 v3 the n4\nthe n1\nthe n2 v3 the n4\n",
    )
    long, short, again = hypotheses(output).values()
    assert short[0].startswith("the n1 ") and long[0].startswith("the n2 v3 the n4 ")
    # Text and scores do not depend on earlier prompts.
    assert again == long
