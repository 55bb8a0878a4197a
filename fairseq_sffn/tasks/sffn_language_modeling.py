"""Language modelling with options for sparse layers."""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
from fairseq.data.indexed_dataset import MMapIndexedDataset, data_file_path, index_file_path
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.utils import split_paths
from omegaconf import II

from ..errors import UsageError
from ..memory.selectors.hash_moe import HashMoE

CHECKED_TOKENS = 2**27
"""Number of tokens at the start of a split that are checked before training.

Reading them takes a fraction of a second. They suffice to detect data that was binarised with
another dictionary."""


@dataclass
class SFFNLanguageModelingConfig(LanguageModelingConfig):
    hash_counts: ChoiceEnum(["dictionary", "train"]) = field(  # type: ignore[valid-type]
        default="dictionary",
        metadata={
            "help": "source of the token counts of balanced hash tables: 'dictionary', dict.txt, "
            "in which fairseq does not count </s>; or 'train', the split that --train-subset "
            "names, for an exact balance"
        },
    )
    eval_capacity_factor: Optional[float] = field(
        default=None,
        metadata={"help": "replaces the --sffn-eval-capacity-factor of a loaded model"},
    )
    # Without help: the flag is fairseq's.
    train_subset: str = II("dataset.train_subset")


@register_task("sffn_language_modeling", dataclass=SFFNLanguageModelingConfig)
class SFFNLanguageModelingTask(LanguageModelingTask):
    """fairseq's ``language_modeling`` with two options and a check.

    The options choose the token counts of hash tables, and the capacity in evaluation. The check
    compares the data with the dictionary before training. Sparse models also run with
    ``language_modeling``. They then use the dictionary's counts, and the capacity that they were
    trained with.

    Raises:
        UsageError: ``--eval-capacity-factor`` is negative, infinite or NaN.
    """

    def __init__(self, args: Any, *arguments: Any, **kwargs: Any) -> None:
        super().__init__(args, *arguments, **kwargs)
        factor = self.eval_capacity_factor
        if factor is not None and not 0 <= factor < math.inf:
            raise UsageError(
                f"--eval-capacity-factor {factor}: must be positive and finite, or 0 for dropless"
            )

    @property
    def eval_capacity_factor(self) -> Optional[float]:
        """Value of ``--eval-capacity-factor``; ``None``: not set, or absent from a namespace."""
        return getattr(self.args, "eval_capacity_factor", None)

    @property
    def hash_counts(self) -> str:
        """Value of ``--hash-counts``; ``dictionary`` if a namespace lacks it."""
        return str(getattr(self.args, "hash_counts", None) or "dictionary")

    def token_counts(self) -> Sequence[int]:
        """Return the occurrences of each token id in the training data: (V,).

        Raises:
            UsageError: with ``--hash-counts train``, the split has no tokens in mmap format.
        """
        if self.hash_counts == "dictionary":
            return self.dictionary.count
        split = getattr(self.args, "train_subset", "train")
        counts = np.zeros(len(self.dictionary), dtype=np.int64)
        folders = range(1, len(split_paths(self.args.data)) + 1)
        for tokens in itertools.chain.from_iterable(self._binarised(split, n) for n in folders):
            for piece in np.array_split(tokens, len(tokens) // CHECKED_TOKENS + 1):
                counts += np.bincount(piece, minlength=len(counts))[: len(counts)]
        if not counts.any():
            raise UsageError(
                f"--hash-counts train: {self.args.data} has no tokens of --train-subset {split} "
                "in mmap format"
            )
        return counts.tolist()

    def build_model(self, args: Any, from_checkpoint: bool = False) -> Any:
        """Return a model.

        Args:
            args: the model's options.
            from_checkpoint: whether a checkpoint will be loaded into the model.

        Raises:
            UsageError: an option of the task does not fit the model.
        """
        if from_checkpoint:
            # The checkpoint has the hash tables, so no counts are needed.
            self.args.hash_counts = "dictionary"
            if (factor := self.eval_capacity_factor) is not None:
                if "sffn_eval_capacity_factor" not in args:
                    raise UsageError(
                        f"--eval-capacity-factor {factor}: the model has no sparse layers"
                    )
                args.sffn_eval_capacity_factor = factor
        elif (factor := self.eval_capacity_factor) is not None:
            raise UsageError(
                f"--eval-capacity-factor {factor}: is for a trained model; in training, set "
                "--sffn-eval-capacity-factor"
            )
        counts = self.hash_counts
        balanced = str(getattr(args, "hash_table", None)) == "balanced"
        balanced |= str(getattr(args, "sffn_selector", None)) == HashMoE.name
        if counts != "dictionary" and not balanced:
            raise UsageError(
                f"--hash-counts {counts}: is for models with --hash-table balanced, and for "
                f"{HashMoE.name}"
            )
        return super().build_model(args, from_checkpoint)

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> Any:
        """Load a split, as fairseq does, and check its first ``CHECKED_TOKENS`` token ids.

        Raises:
            UsageError: a token id is outside the dictionary.
        """
        super().load_dataset(split, epoch, combine, **kwargs)
        types = len(self.dictionary)
        for tokens in self._binarised(split, epoch):
            highest = int(tokens[:CHECKED_TOKENS].max(initial=0))
            if highest >= types:
                raise UsageError(
                    f"token id {highest} in split {split} of {self.args.data}: outside the "
                    f"dictionary of {types} types; the data was binarised with another dict.txt"
                )

    def _binarised(self, split: str, epoch: int = 1) -> Iterator[Any]:
        """Yield the token ids of each part (train, train1, ...) of an epoch's split.

        They are memory maps.
        """
        paths = split_paths(self.args.data)
        folder = paths[(epoch - 1) % len(paths)]
        for part in itertools.count():
            prefix = os.path.join(folder, f"{split}{part or ''}")
            if not MMapIndexedDataset.exists(prefix):
                return
            index = MMapIndexedDataset.Index(index_file_path(prefix))
            if os.path.getsize(data_file_path(prefix)):
                yield np.memmap(data_file_path(prefix), dtype=index.dtype, mode="r")
