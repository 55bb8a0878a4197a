"""Checks of the options of each of fairseq's commands, before the command begins.

Each function takes the configuration, and raises ``UsageError`` if the command could not work. The
message names an option and the reason.
"""

from __future__ import annotations

from typing import Any

from fairseq.data import data_utils
from fairseq.model_parallel import megatron_trainer

from ..errors import UsageError
from .splits import check_splits


def check_training(cfg: Any) -> None:
    """Check that training has a batch size, data and the packages that it needs."""
    check_batch_size(cfg)
    if cfg.common.model_parallel_size > 1 and not megatron_trainer.has_megatron_submodule:
        raise UsageError(
            f"--model-parallel-size {cfg.common.model_parallel_size}: needs Megatron-LM, which is "
            "not installed"
        )
    validation = () if cfg.dataset.disable_validation else ("valid_subset",)
    check_splits(cfg, "train_subset", *validation)
    if not cfg.dataset.disable_validation:
        try:
            data_utils.raise_if_valid_subsets_unintentionally_ignored(cfg)
        except ValueError as error:
            raise UsageError(f"--valid-subset {cfg.dataset.valid_subset}: {error}") from error


def check_validation(cfg: Any) -> None:
    """Check that validation has a batch size and data."""
    check_batch_size(cfg)
    check_splits(cfg, "valid_subset")


def check_evaluation(cfg: Any) -> None:
    """Check that evaluation has data, and that its context window leaves tokens to score."""
    check_splits(cfg, "gen_subset")
    window, length = cfg.eval_lm.context_window, getattr(cfg.task, "tokens_per_sample", None)
    if length is not None and window >= length:
        raise UsageError(
            f"--context-window {window}: leaves nothing of --tokens-per-sample {length}"
        )


def check_generation(cfg: Any) -> None:
    """Check that generation has data, and that its options agree."""
    check_decoding(cfg)
    check_splits(cfg, "gen_subset")


def check_interaction(cfg: Any) -> None:
    """Check that the options of interactive decoding agree."""
    check_decoding(cfg)
    batch, buffer = cfg.dataset.batch_size, max(cfg.interactive.buffer_size, 1)
    if batch is not None and batch > buffer:
        raise UsageError(f"--batch-size {batch}: must be at most --buffer-size {buffer}")


def check_decoding(cfg: Any) -> None:
    """Check that the options of decoding agree."""
    options = cfg.generation
    if options.sampling and options.nbest != options.beam:
        raise UsageError(
            f"--nbest {options.nbest}: must equal --beam {options.beam} with --sampling"
        )
    searches = {
        "--sampling": options.sampling,
        "--diverse-beam-groups": options.diverse_beam_groups > 0,
        "--match-source-len": options.match_source_len,
        "--diversity-rate": options.diversity_rate > 0,
    }
    if len(asked := [name for name, wanted in searches.items() if wanted]) > 1:
        raise UsageError(f"{' and '.join(asked)}: are different searches; choose one")


def check_batch_size(cfg: Any) -> None:
    """Check that a batch size is set."""
    if cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        raise UsageError("--max-tokens or --batch-size: one of them is required")
