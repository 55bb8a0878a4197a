"""Counts of the tokens that an evaluation scores, and of the tokens that it leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch


def sizes_of(dataset: Any) -> np.ndarray | None:
    """Return the number of tokens of each sample: (samples,).

    In a data set with source and target, target tokens count.

    Returns:
        The numbers; ``None``: the data set does not know them.
    """
    sizes = getattr(dataset, "sizes", None)
    if sizes is None and hasattr(dataset, "dataset"):
        return sizes_of(dataset.dataset)
    if not isinstance(sizes, np.ndarray) or len(sizes) != len(dataset):
        return None
    return sizes if sizes.ndim == 1 else sizes[:, -1]


def total(sizes: np.ndarray) -> int:
    """Return the sum of sizes in int64. Sizes may have a small integer type."""
    return int(sizes.sum(dtype=np.int64))


def binarised_tokens(dataset: Any) -> int:
    """Return the number of tokens of the split from which a data set was made.

    The innermost data set that knows its sizes still has all tokens.
    """
    sizes = getattr(dataset, "sizes", None)
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
        if getattr(dataset, "sizes", None) is not None:
            sizes = dataset.sizes
    return total(np.asarray(sizes))


class LeftOut(NamedTuple):
    """Samples of a data set that are not used.

    Attributes:
        samples: number of these samples.
        of_samples: number of all samples.
        tokens: number of tokens in these samples; ``None``: the data set does not know.
        of_tokens: number of tokens in all samples; ``None``: the data set does not know.
    """

    samples: int
    of_samples: int
    tokens: int | None
    of_tokens: int | None

    def __str__(self) -> str:
        samples = f"{self.samples:,} of {self.of_samples:,} samples"
        if self.tokens is None:
            return samples
        return f"{self.tokens:,} of {self.of_tokens:,} tokens, in {samples}"


def left_out(dataset: Any, kept: Any, indices: Any) -> LeftOut | None:
    """Return the samples that are left out of a data set; ``None``: there are none.

    Args:
        dataset: the data set.
        kept: indices of the samples that are used.
        indices: indices of all samples.
    """
    missing = np.setdiff1d(np.asarray(indices, dtype=np.int64), np.asarray(kept, dtype=np.int64))
    if not len(missing):
        return None
    sizes = sizes_of(dataset)
    if sizes is None:
        return LeftOut(len(missing), len(indices), None, None)
    return LeftOut(len(missing), len(indices), total(sizes[missing]), total(sizes[indices]))


@dataclass
class Scored:
    """Counts of the tokens that ``fairseq-eval-lm`` scores.

    Attributes:
        begin: number of tokens at the start of each sample that do not count (``<s>``).
        tokens: number of tokens in the loss.
        impossible: number of tokens that are left out because their score is infinite.
    """

    begin: int = 0
    tokens: int = 0
    impossible: int = 0

    def add(self, hypotheses: list[list[dict[str, Any]]]) -> None:
        """Count the tokens of a batch.

        Args:
            hypotheses: result of ``SequenceScorer.generate``.
        """
        for best, *_ in hypotheses:
            scores = best["positional_scores"][self.begin :]
            impossible = int(torch.isinf(scores).sum())
            self.tokens += scores.numel() - impossible
            self.impossible += impossible


@dataclass(frozen=True)
class Split:
    """Counts of the tokens of a split, and of those that cannot be scored.

    Attributes:
        tokens: number of tokens that ``fairseq-preprocess`` wrote.
        cut: number of tokens that are in no sample.
        long: number of tokens in samples that are longer than the model's positions.
        long_samples: number of these samples.
        positions: the model's positions.
        shards: number of shards of the samples. One shard is evaluated.
        break_mode: the task's ``--sample-break-mode``. ``none`` may split a sentence.
    """

    tokens: int
    cut: int
    long: int
    long_samples: int
    positions: Any
    shards: int
    break_mode: str

    @classmethod
    def of(cls, dataset: Any, positions: Any, shards: int, break_mode: Any) -> Split | None:
        """Return the counts of a data set's split; ``None``: the sizes are not known."""
        sizes, too_long = sizes_of(dataset), []
        if sizes is None:
            return None
        if positions is not None:
            _, too_long = dataset.filter_indices_by_size(np.arange(len(dataset)), positions)
        tokens = binarised_tokens(dataset)
        cut, long = tokens - total(sizes), total(sizes[too_long]) if too_long else 0
        return cls(tokens, cut, long, len(too_long), positions, shards, str(break_mode))

    def left_out(self, scored: Scored) -> str:
        """Return in words how many tokens are left out of a result, and why."""
        missing = self.tokens - scored.tokens
        shorter = "" if self.break_mode == "none" else "; --sample-break-mode none scores all"
        reasons = {
            f"in {self.long_samples:,} samples longer than the model's {self.positions} positions"
            + shorter: self.long,
            f"cut by --sample-break-mode {self.break_mode} or --shorten-method": self.cut,
            "of probability 0": scored.impossible,
        }
        if self.shards > 1 and scored.tokens:
            reasons[f"dealt to others of {self.shards} shards"] = missing - sum(reasons.values())
        told = ", ".join(f"{count:,} {why}" for why, count in reasons.items() if count > 0)
        return f"{missing:,} of {self.tokens:,} tokens are left out of the loss: {told or 'all'}"
