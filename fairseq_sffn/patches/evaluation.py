"""Patches of ``fairseq-eval-lm``, which count the tokens that it scores and leaves out."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from fairseq.sequence_scorer import SequenceScorer

from ..errors import UsageError
from ..options.checks import check_ranges
from ..options.commands import check_evaluation
from ..options.configuration import as_configuration
from .left_out import Scored, Split
from .registry import MENDS_FAIRSEQ, patch

logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """Counts of one call of ``fairseq-eval-lm``.

    Attributes:
        scored: counts of the scored tokens.
        split: counts of the tokens of the split; ``None``: the data set does not know its sizes.
    """

    scored: Scored = field(default_factory=Scored)
    split: Split | None = None


current: ContextVar[Evaluation | None] = ContextVar("evaluation", default=None)
"""The evaluation that runs. fairseq calls its parts, and passes no argument for it."""


@patch(
    "fairseq_cli.eval_lm:main",
    why="fairseq-eval-lm leaves out samples that are longer than the model's positions. If all "
    "are, it prints a perplexity of 1.00.",
    until="fairseq counts what it leaves out, and checks its options.",
    kind=MENDS_FAIRSEQ,
    written_for=("38cd77f9",),
)
def main(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check the options of evaluation, and add the numbers of tokens to the result."""

    @functools.wraps(original)
    def wrapper(cfg: Any, **kwargs: Any) -> dict[str, Any]:
        cfg = as_configuration(cfg)
        check_ranges(cfg)
        check_evaluation(cfg)
        evaluation = Evaluation(Scored(begin=int(getattr(cfg.task, "add_bos_token", False))))
        token = current.set(evaluation)
        try:
            found = original(cfg, **kwargs)
        finally:
            current.reset(token)
        scored, split = evaluation.scored, evaluation.split
        found["tokens"] = scored.tokens
        if split is not None:
            if not scored.tokens:
                raise UsageError(f"there is nothing to evaluate: {split.left_out(scored)}")
            found["left_out_tokens"] = split.tokens - scored.tokens
            if found["left_out_tokens"]:
                logger.warning(split.left_out(scored))
        return found

    return wrapper


@patch(
    "fairseq.sequence_scorer:SequenceScorer.generate",
    why="fairseq-eval-lm does not say how many tokens it scores.",
    until="fairseq-eval-lm returns their number.",
    kind=MENDS_FAIRSEQ,
    written_for=("d505d5be",),
)
def generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Count the tokens that an evaluation scores."""

    @functools.wraps(original)
    def wrapper(self: SequenceScorer, models: Any, sample: Any, **kwargs: Any) -> Any:
        hypotheses = original(self, models, sample, **kwargs)
        if (evaluation := current.get()) is not None:
            evaluation.scored.add(hypotheses)
        return hypotheses

    return wrapper


@patch(
    "fairseq.tasks.language_modeling:LanguageModelingTask.eval_lm_dataloader",
    why="With its default --tokens-per-sample 1024, fairseq-eval-lm leaves out the whole text if a "
    "model has fewer positions.",
    until="fairseq evaluates at the model's positions, or refuses.",
    kind=MENDS_FAIRSEQ,
    written_for=("02d29f1b",),
)
def eval_lm_dataloader(original: Callable[..., Any]) -> Callable[..., Any]:
    """Cut a split into samples that fit the model's positions, and count its tokens.

    The batches get an attribute ``split``, a :class:`~.left_out.Split` or ``None``.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        dataset = given["dataset"] = cut_to_positions(
            self, given["dataset"], given["max_positions"], given["context_window"]
        )
        mode = getattr(self.args, "sample_break_mode", None)
        split = Split.of(dataset, given["max_positions"], given["num_shards"], mode)
        if split is not None and split.long + split.cut == split.tokens:
            raise UsageError(f"there is nothing to evaluate: {split.left_out(Scored())}")
        batches = original(*call.args, **call.kwargs)
        batches.split = split
        if (evaluation := current.get()) is not None:
            evaluation.split = split
        return batches

    return wrapper


def cut_to_positions(task: Any, dataset: Any, max_positions: int | None, window: int) -> Any:
    """Return a split in samples that fit the model's positions.

    Args:
        task: the task. If its ``tokens_per_sample`` is too large, the function lowers it.
        dataset: the split. A data set that is not a split of the task is returned unchanged.
        max_positions: the model's positions; ``None``: not limited.
        window: tokens of context before each sample.

    Raises:
        UsageError: the context takes all positions.
    """
    splits = [name for name, of in task.datasets.items() if of is dataset]
    if max_positions is None or not splits:
        return dataset
    asked = task.args.tokens_per_sample
    if asked + window <= max_positions:
        return dataset
    if window >= max_positions:
        raise UsageError(f"--context-window {window}: the model has {max_positions} positions")
    task.args.tokens_per_sample = max_positions - window
    logger.warning(
        f"--tokens-per-sample {asked + window}: the model has {max_positions} "
        f"positions; evaluating at {max_positions}"
    )
    task.load_dataset(splits[0])
    return task.dataset(splits[0])
