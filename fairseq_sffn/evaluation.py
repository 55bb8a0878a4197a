"""What evaluation with fairseq leaves out: the last batch is used, other tokens are counted.

Each function is one wrapper, as those of :mod:`.compat`: what breaks, and when it can go.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq_cli import eval_lm as eval_command
from fairseq_cli import generate as generate_command
from fairseq_cli import validate as validate_command

from .compat import replace_once
from .errors import UsageError
from .left_out import Scored, Split, left_out

logger = logging.getLogger(__name__)


def apply() -> None:
    """Apply every wrapper. :mod:`.compat` wraps ``eval_lm_dataloader`` too, to load a data set
    again, and has to come later, so that the set that is evaluated is the one that is counted."""
    use_the_last_batch()
    count_what_filters_leave_out()
    count_what_eval_lm_scores()


# The last batch


def use_the_last_batch() -> None:
    """fairseq leaves out the last batch where its size is no multiple of
    ``--required-batch-size-multiple`` (8), in validation and generation too: up to 7 sentences have
    no part in a perplexity, and no translation. Can go when fairseq uses all."""

    def using_all(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def main(cfg: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(cfg, Namespace):
                cfg = convert_namespace_to_omegaconf(cfg)
            with batches_of_any_size(cfg.dataset):
                return original(cfg, *args, **kwargs)

        return main

    for module, name in ((generate_command, "_main"), (validate_command, "main")):
        replace_once(module, name, using_all(getattr(module, name)))


@contextlib.contextmanager
def batches_of_any_size(config: Any) -> Iterator[None]:
    """No required multiple of a batch's size while this is open.

    Args:
        config: of the data sets.
    """
    required = config.required_batch_size_multiple
    config.required_batch_size_multiple = 1
    try:
        yield
    finally:
        config.required_batch_size_multiple = required


# Filters


def count_what_filters_leave_out() -> None:
    """fairseq tells how many samples it leaves out, but neither of how many nor how long they are.
    Can go when it does."""

    @functools.wraps(FairseqTask.filter_indices_by_size)
    def filter_indices_by_size(
        self: FairseqTask, indices: Any, dataset: Any, *args: Any, **kwargs: Any
    ) -> Any:
        kept = original(self, indices, dataset, *args, **kwargs)
        if found := left_out(dataset, kept, indices):
            logger.warning(f"left out: {found}")
        return kept

    original = FairseqTask.filter_indices_by_size
    replace_once(FairseqTask, "filter_indices_by_size", filter_indices_by_size)


# fairseq-eval-lm


def count_what_eval_lm_scores() -> None:
    """``fairseq-eval-lm`` leaves out samples that are longer than the model's positions (sentences,
    with ``--sample-break-mode``), and prints a perplexity of 1.00 if those are all. Tells how many
    tokens of how many have no part in the result, and refuses if none has. Can go when fairseq
    does."""

    @functools.wraps(SequenceScorer.generate)
    def generate(self: SequenceScorer, models: Any, sample: Any, **kwargs: Any) -> Any:
        hypotheses = original_generate(self, models, sample, **kwargs)
        if isinstance(scored := sample.get("scored"), Scored):
            scored.add(hypotheses)
        return hypotheses

    @functools.wraps(LanguageModelingTask.eval_lm_dataloader)
    def eval_lm_dataloader(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature_dataloader.bind(self, dataset, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        mode = getattr(self.args, "sample_break_mode", None)
        split = Split.of(dataset, given["max_positions"], given["num_shards"], mode)
        if split is not None and split.long + split.cut == split.tokens:
            raise UsageError(f"there is nothing to evaluate: {split.left_out(Scored())}")
        batches = original_dataloader(self, dataset, *args, **kwargs)
        batches.split = split
        return batches

    @functools.wraps(eval_command.eval_lm)
    def eval_lm(*args: Any, **kwargs: Any) -> dict[str, Any]:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        batches = call.arguments["batch_iterator"]
        split = getattr(getattr(batches, "iterable", batches), "split", None)
        scored = Scored(begin=int(call.arguments["remove_bos_token"]))
        call.arguments["batch_iterator"] = (
            {**sample, "scored": scored} if "net_input" in sample else sample for sample in batches
        )
        found = original(*call.args, **call.kwargs)
        found["tokens"] = scored.tokens
        if isinstance(split, Split) and not scored.tokens:
            raise UsageError(f"there is nothing to evaluate: {split.left_out(scored)}")
        if isinstance(split, Split):
            found["left_out_tokens"] = split.tokens - scored.tokens
            if found["left_out_tokens"]:
                logger.warning(split.left_out(scored))
        return found

    original_generate = SequenceScorer.generate
    replace_once(SequenceScorer, "generate", generate)
    original_dataloader = LanguageModelingTask.eval_lm_dataloader
    signature_dataloader = inspect.signature(original_dataloader)
    replace_once(LanguageModelingTask, "eval_lm_dataloader", eval_lm_dataloader)
    original = eval_command.eval_lm
    signature = inspect.signature(original)
    replace_once(eval_command, "eval_lm", eval_lm)
