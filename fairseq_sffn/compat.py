"""Repairs of fairseq (``ve-fairseq`` 0.12.3) for today's Python, NumPy and PyTorch.

Each function is one repair: what breaks, and when it can go. All are safe to apply twice.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import logging
import os
import pickle
import shutil
import types
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq.logging.meters import AverageMeter, SumMeter
from fairseq.models.ema.ema import EMA
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.trainer import Trainer
from fairseq_cli import eval_lm as eval_command
from fairseq_cli import train as train_command
from torch.serialization import MAGIC_NUMBER

from .errors import UsageError

logger = logging.getLogger(__name__)


def apply() -> None:
    """Apply every repair."""
    restore_numpy_compat()
    copy_checkpoints_atomically()
    save_plain_containers()
    restore_arrays_of_meters()
    check_save_directory_first()
    refuse_code_in_checkpoints()
    refuse_half_precision_on_cpu()
    evaluate_at_the_model_context()
    leave_finished_runs_alone()
    copy_integers_into_moving_averages()
    keep_versions_in_moving_averages()
    deal_the_same_batches_when_resumed()


def restore_numpy_compat() -> None:
    """``np.compat.long`` left NumPy in 2.0, but TokenBlockDataset uses it (``--sample-break-mode
    eos``, generation). Can go when fairseq no longer does."""
    if not hasattr(np, "compat"):
        np.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]


def copy_checkpoints_atomically() -> None:
    """fairseq writes ``checkpoint1.pt`` atomically but copies it over ``checkpoint_last.pt`` in
    place: killed meanwhile, it leaves no checkpoint to resume from. Can go when
    ``PathManager.copy`` is atomic."""

    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if PathManager.path_requires_pathmanager(dst_path):
            return original(src_path, dst_path, overwrite)
        partial = f"{dst_path}.tmp"
        shutil.copyfile(src_path, partial)
        os.replace(partial, dst_path)
        return True

    original = PathManager.copy
    replace_once(PathManager, "copy", copy, staticmethod)


def save_plain_containers() -> None:
    """Meters hold NumPy's arrays (``--eval-bleu`` counts in them), which PyTorch refuses to load
    from a checkpoint. Saves lists and Python's numbers. Can go when fairseq does."""

    @functools.wraps(checkpoint_utils.torch_persistent_save)
    def torch_persistent_save(obj: Any, *args: Any, **kwargs: Any) -> None:
        original(without_numpy(obj), *args, **kwargs)

    original = checkpoint_utils.torch_persistent_save
    replace_once(checkpoint_utils, "torch_persistent_save", torch_persistent_save)


def without_numpy(value: Any) -> Any:
    """The value with lists for NumPy's arrays and Python's numbers for its scalars, within plain
    containers too."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(without_numpy, value))
    if isinstance(value, dict):
        result = copy.copy(value)  # with the attributes that a model's state has
        for key, of in value.items():
            result[key] = without_numpy(of)
        return result
    return value


def restore_arrays_of_meters() -> None:
    """A meter that summed arrays cannot average the list that is saved of them: arrays again. Can
    go with ``save_plain_containers``."""

    def restoring(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def load_state_dict(self: Any, state: dict[str, Any]) -> None:
            arrays = {key: np.array(of) for key, of in state.items() if isinstance(of, list)}
            original(self, {**state, **arrays})

        return load_state_dict

    for meter in (AverageMeter, SumMeter):
        replace_once(meter, "load_state_dict", restoring(meter.load_state_dict))


def check_save_directory_first() -> None:
    """fairseq tries the directory for checkpoints before it trains, but ends in a traceback if it
    cannot write there. Can go when it names the flag and the reason."""

    @functools.wraps(checkpoint_utils.verify_checkpoint_directory)
    def verify_checkpoint_directory(save_dir: str) -> None:
        try:
            original(save_dir)
        except OSError as error:
            raise UsageError(
                f"--save-dir {save_dir}: cannot be written to: {error.strerror}"
            ) from error

    original = checkpoint_utils.verify_checkpoint_directory
    replace_once(checkpoint_utils, "verify_checkpoint_directory", verify_checkpoint_directory)


def refuse_code_in_checkpoints() -> None:
    """PyTorch refuses pickled code by default, but ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` turns that
    off for fairseq, which does not ask for it; and the refusal fills a page. Can go when fairseq
    passes ``weights_only=True``.

    The configuration of older optimizers is an ``argparse.Namespace``: a plain container, allowed.
    """
    torch.serialization.add_safe_globals([argparse.Namespace])

    def checked(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load(path: str, *args: Any, **kwargs: Any) -> Any:
            check_checkpoint(PathManager.get_local_path(path))
            return original(path, *args, **kwargs)

        return load

    for name in ("load_checkpoint_to_cpu", "load_ema_from_checkpoint"):
        replace_once(checkpoint_utils, name, checked(getattr(checkpoint_utils, name)))

    @functools.wraps(checkpoint_utils.load_model_ensemble_and_task)
    def load_model_ensemble_and_task(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        # fairseq would say so in a traceback; a suffix or shards make other names of these.
        if given["state"] is None and not given["suffix"] and given["num_shards"] == 1:
            for path in given["filenames"]:
                check_checkpoint(PathManager.get_local_path(path))
        return original(*args, **kwargs)

    original = checkpoint_utils.load_model_ensemble_and_task
    signature = inspect.signature(original)
    replace_once(checkpoint_utils, "load_model_ensemble_and_task", load_model_ensemble_and_task)


def check_checkpoint(path: str) -> Any:
    """Read a checkpoint without running anything in it.

    Returns:
        what it holds; tensors are mapped, not read, unless the file is of PyTorch before 1.6.

    Raises:
        UsageError: the file is missing, no checkpoint, truncated, or holds more than tensors and
            plain containers.
    """
    if not os.path.isfile(path):
        raise UsageError(f"checkpoint {path}: there is no such file")
    of_today = zipfile.is_zipfile(path)
    if not of_today and not is_of_old_torch(path):
        raise UsageError(f"checkpoint {path}: truncated, or not a checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=of_today)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"checkpoint {path}: refused, it holds more than tensors and plain containers, "
            "and could run code"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise UsageError(f"checkpoint {path}: damaged, or not a checkpoint") from error


def is_of_old_torch(path: str) -> bool:
    """Whether a file begins as those of PyTorch before 1.6, which published models are in, do: with
    a number. Nothing in it is run."""
    begin = pickle.dumps(MAGIC_NUMBER, protocol=2)
    with open(path, "rb") as file:
        return file.read(len(begin)) == begin


def refuse_half_precision_on_cpu() -> None:
    """On a CPU ``--fp16`` fails inside the optimizer and ``--bf16`` is taken for a TPU. Can go when
    fairseq says so itself."""

    @functools.wraps(Trainer.__init__)
    def __init__(self: Trainer, cfg: Any, *args: Any, **kwargs: Any) -> None:
        check_precision(cfg.common)
        original(self, cfg, *args, **kwargs)

    original = Trainer.__init__
    replace_once(Trainer, "__init__", __init__)


def check_precision(common: Any) -> None:
    """Raises UsageError where half precision is asked for without a GPU to compute it."""
    if common.cpu or not torch.cuda.is_available():
        for flag in ("fp16", "bf16", "amp"):
            if getattr(common, flag):
                raise UsageError(f"--{flag}: needs a GPU, and this command runs on the CPU")


def evaluate_at_the_model_context() -> None:
    """``fairseq-eval-lm`` leaves out every sample that is longer than the model's positions: with
    its default ``--tokens-per-sample 1024`` that is the whole text for a model trained on less, and
    it prints a perplexity of 1.00. Can go when fairseq evaluates or refuses."""

    @functools.wraps(LanguageModelingTask.eval_lm_dataloader)
    def eval_lm_dataloader(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        max_positions, window = given["max_positions"], given["context_window"]
        # A caller's own dataset cannot be cut anew.
        splits = [name for name, of in self.datasets.items() if of is given["dataset"]]
        if max_positions is None or not splits:
            return original(*call.args, **call.kwargs)
        asked = self.args.tokens_per_sample
        if asked + window > max_positions:
            if window >= max_positions:
                raise UsageError(
                    f"--context-window {window}: the model has {max_positions} positions"
                )
            self.args.tokens_per_sample = max_positions - window
            logger.warning(
                f"--tokens-per-sample {asked + window}: the model has {max_positions} "
                f"positions; evaluating at {max_positions}"
            )
            self.load_dataset(splits[0])
            given["dataset"] = self.dataset(splits[0])
        return original(*call.args, **call.kwargs)

    @functools.wraps(eval_command.main)
    def main(cfg: Any, **kwargs: Any) -> Any:
        window, length = cfg.eval_lm.context_window, getattr(cfg.task, "tokens_per_sample", None)
        if length is not None and window >= length:
            raise UsageError(
                f"--context-window {window}: leaves nothing of --tokens-per-sample {length}"
            )
        return original_main(cfg, **kwargs)

    original_main = eval_command.main
    replace_once(eval_command, "main", main)
    original = LanguageModelingTask.eval_lm_dataloader
    signature = inspect.signature(original)
    replace_once(LanguageModelingTask, "eval_lm_dataloader", eval_lm_dataloader)


def leave_finished_runs_alone() -> None:
    """``fairseq-train``, run again when ``--max-update`` is reached, trains one update more, and
    stores it. Can go when fairseq looks before it trains."""

    @functools.wraps(train_command.train)
    def train(cfg: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> tuple[list[None], bool]:
        updates, max_update = trainer.get_num_updates(), cfg.optimization.max_update
        if max_update and updates >= max_update:
            logger.info(f"nothing to train: at update {updates} of --max-update {max_update}")
            return [None], True
        return original(cfg, trainer, *args, **kwargs)

    original = train_command.train
    replace_once(train_command, "train", train)


def copy_integers_into_moving_averages() -> None:
    """``--store-ema`` averages buffers too, and fails on whole numbers, such as hash tables. Can go
    when fairseq copies them."""

    @functools.wraps(EMA.__init__)
    def __init__(self: EMA, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, model, *args, **kwargs)
        state = model.state_dict()
        self.skip_keys = {*self.skip_keys, *(k for k in state if not state[k].is_floating_point())}

    original = EMA.__init__
    replace_once(EMA, "__init__", __init__)


def keep_versions_in_moving_averages() -> None:
    """``--store-ema`` updates its model without the modules' versions, which a Transformer takes
    for those of an old checkpoint, and drops its last layer norm. Can go when fairseq gives
    them."""

    @functools.wraps(EMA.restore)
    def restore(self: EMA, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        own = self.model.state_dict()
        versions = {key: own[key] for key in own if key.endswith("version")}
        original(self, {**versions, **state_dict}, *args, **kwargs)

    original = EMA.restore
    replace_once(EMA, "restore", restore)


def deal_the_same_batches_when_resumed() -> None:
    """fairseq deals sentences to batches by the seed and the epoch that a command starts in, and
    keeps the batches for later epochs: resumed in a later one, it would deal others. Deals by the
    first epoch wherever batches are kept. Can go when fairseq does."""

    @functools.wraps(FairseqTask.get_batch_iterator)
    def get_batch_iterator(self: FairseqTask, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        dataset, epoch = given["dataset"], given["epoch"]
        kept = (
            self.can_reuse_epoch_itr(dataset)
            and not given["disable_iterator_cache"]
            and not given["update_epoch_batch_itr"]
            and not getattr(self.cfg, "rebuild_batches", False)
        )
        if not kept or dataset in self.dataset_to_epoch_iter:
            return original(*call.args, **call.kwargs)
        given["epoch"] = 1
        iterator = original(*call.args, **call.kwargs)
        iterator.epoch = epoch
        dataset.set_epoch(epoch)
        return iterator

    original = FairseqTask.get_batch_iterator
    signature = inspect.signature(original)
    replace_once(FairseqTask, "get_batch_iterator", get_batch_iterator)


def replace_once(
    owner: Any, name: str, function: Callable[..., Any], wrap: Callable[..., Any] = lambda f: f
) -> None:
    """Sets an attribute, unless the same repair has set it, or one that others went on from."""
    repair, done = function.__code__.co_qualname, getattr(getattr(owner, name), "sffn_repairs", ())
    if repair not in done:
        function.sffn_repairs = (*done, repair)  # type: ignore[attr-defined]
        setattr(owner, name, wrap(function))
