"""Checks of a command's options before any work: every number within its range."""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import typing
from typing import Any

from fairseq import models
from fairseq.data import data_utils
from fairseq.dataclass import utils as dataclass_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.model_parallel import megatron_trainer
from fairseq.models.transformer import TransformerModelBase
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq_cli import eval_lm, generate, interactive, train, validate
from omegaconf import ListConfig

from .checkpoints.writing import take_over_asynchronous_writing
from .compat import replace_once
from .configuration import writable
from .errors import UsageError, flag, shown
from .models.size import check_size
from .ranges import RANGES, Range
from .relations import RELATIONS
from .splits import check_splits

PARSE_ERRORS = (ValueError, SyntaxError, OverflowError, MemoryError, RecursionError)
"""What parsing the text of numbers can end in."""


def apply() -> None:
    """Apply every check."""
    refuse_lists_of_no_numbers()
    keep_defaults_of_other_options()
    check_before_processes_start()
    check_each_command()
    check_each_model()


def refuse_lists_of_no_numbers() -> None:
    """``--lr 1..2`` and ``--update-freq 1e999`` end in a traceback, and ``--update-freq 1.5`` is
    taken for 1. Gives argparse the error that it knows. Can go when fairseq does."""

    @functools.wraps(dataclass_utils.eval_str_list)
    def eval_str_list(x: Any, x_type: Any = float) -> Any:
        try:
            numbers, given = original(x, x_type), original(x, float)
        except PARSE_ERRORS as error:
            raise ValueError(str(error)) from error
        if numbers != given:
            raise ValueError(f"{x} is not of whole numbers")
        return numbers

    original = dataclass_utils.eval_str_list
    replace_once(dataclass_utils, "eval_str_list", eval_str_list)


def keep_defaults_of_other_options() -> None:
    """``--lr-scheduler polynomial_decay`` without ``--total-num-update`` ends in a traceback: a
    number whose default is another option's value is set to nothing. Leaves the default. Can go
    when fairseq does."""

    @functools.wraps(dataclass_utils._override_attr)
    def _override_attr(sub_node: str, data_class: Any, args: Any) -> list[str]:
        nothing = {
            f"{sub_node}.{name}=null"
            for name, field in getattr(data_class, "__dataclass_fields__", {}).items()
            if str(field.default).startswith("${") and type(None) not in typing.get_args(field.type)
        }
        return [line for line in original(sub_node, data_class, args) if line not in nothing]

    original = dataclass_utils._override_attr
    replace_once(dataclass_utils, "_override_attr", _override_attr)


def check_before_processes_start() -> None:
    """fairseq starts processes by numbers that it has not looked at. Can go when it does."""

    @functools.wraps(distributed_utils.call_main)
    def call_main(cfg: Any, main: Any, **kwargs: Any) -> Any:
        check_ranges(cfg)
        return original(cfg, main, **kwargs)

    original = distributed_utils.call_main
    replace_once(distributed_utils, "call_main", call_main)


def check_each_command() -> None:
    """fairseq trains and decodes by numbers that mean nothing, or ends in a traceback. Can go when
    it checks its options.

    ``fairseq-hydra-train`` imports the plugin in the midst of ``train.main``, which then looks up
    ``add_defaults``.
    """

    @functools.wraps(train.add_defaults)
    def add_defaults(cfg: Any) -> None:
        take_over_asynchronous_writing(cfg.checkpoint)
        add(cfg)
        check_ranges(cfg)
        check_training(cfg)

    add = train.add_defaults
    replace_once(train, "add_defaults", add_defaults)

    def checked(original: Any, check: Any) -> Any:
        @functools.wraps(original)
        def main(cfg: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(cfg, argparse.Namespace):
                cfg = convert_namespace_to_omegaconf(cfg)
            check_ranges(cfg)
            check(cfg)
            return original(cfg, *args, **kwargs)

        return main

    commands = {
        **{eval_lm: check_evaluation, generate: check_generation},
        **{interactive: check_interaction, validate: check_validation},
    }
    for command, check in commands.items():
        replace_once(command, "main", checked(command.main, check))


def check_each_model() -> None:
    """A model is also built from a checkpoint's options, and those that replace them. Can go when
    fairseq checks its options."""

    @functools.wraps(models.build_model)
    def build_model(cfg: Any, task: Any, *args: Any, **kwargs: Any) -> Any:
        if is_transformer(cfg):
            full = with_defaults_of_architecture(cfg)
            check_group("model", full)
            check_cutoffs(full, task)
            check_size(full, task)
        return original(cfg, task, *args, **kwargs)

    original = models.build_model
    replace_once(models, "build_model", build_model)


def check_cutoffs(args: Any, task: Any) -> None:
    """Raises UsageError where the bands of adaptive embeddings go beyond the dictionary."""
    for option, side in (("softmax", "target"), ("input", "source")):
        name = f"adaptive_{option}_cutoff"
        cutoffs = numbers_of(getattr(args, name, None))
        types = len(getattr(task, f"{side}_dictionary", None) or ())
        if cutoffs and types and cutoffs[-1] > types:
            raise UsageError(
                f"{flag(name)} {shown(getattr(args, name))}: is beyond the {types} types of the "
                "dictionary"
            )


def with_defaults_of_architecture(options: Any) -> Any:
    """A model's options, with those that fairseq fills in by the name of an architecture."""
    name = getattr(options, "_name", None) or getattr(options, "arch", None)
    if name in models.MODEL_DATACLASS_REGISTRY or name not in models.ARCH_CONFIG_REGISTRY:
        return options
    options = copy.deepcopy(options)
    with writable(options):
        models.ARCH_CONFIG_REGISTRY[name](options)
    return options


def check_training(cfg: Any) -> None:
    """Raises UsageError where a training has no batches, or no data."""
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
    """Raises UsageError where a validation has no batches, or no data."""
    check_batch_size(cfg)
    check_splits(cfg, "valid_subset")


def check_evaluation(cfg: Any) -> None:
    """Raises UsageError where an evaluation has no data."""
    check_splits(cfg, "gen_subset")


def check_batch_size(cfg: Any) -> None:
    """Raises UsageError where batches have no size."""
    if cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        raise UsageError("--max-tokens or --batch-size: one of them is required")


def check_generation(cfg: Any) -> None:
    """Raises UsageError where generation has no data, or its options contradict each other."""
    check_decoding(cfg)
    check_splits(cfg, "gen_subset")


def check_decoding(cfg: Any) -> None:
    """Raises UsageError where options of decoding contradict each other."""
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


def check_interaction(cfg: Any) -> None:
    """Raises UsageError where options of interactive decoding contradict each other."""
    check_decoding(cfg)
    batch, buffer = cfg.dataset.batch_size, max(cfg.interactive.buffer_size, 1)
    if batch is not None and batch > buffer:
        raise UsageError(f"--batch-size {batch}: must be at most --buffer-size {buffer}")


def check_ranges(cfg: Any) -> None:
    """Raises UsageError for the first option of a whole configuration that is out of its range."""
    if isinstance(cfg, argparse.Namespace):
        cfg = convert_namespace_to_omegaconf(cfg)
    groups = [group for group in RANGES if " " not in group and cfg.get(group) is not None]
    for group in groups:
        check_group(group, cfg[group], cfg)


def check_group(group: str, options: Any, cfg: Any = None) -> None:
    """Raises UsageError for the first option of a group that is out of its range.

    Args:
        group: a key of ``RANGES``.
        options: the options of the group.
        cfg: all options; ``None``: only those of the group are known.
    """
    if group == "model" and not is_transformer(options):
        return
    choice = str(getattr(options, "_name", None))
    for name, range in {**RANGES[group], **RANGES.get(f"{group} {choice}", {})}.items():
        value = getattr(options, name, None)
        if value is not None and not all_hold(range, value):
            numbers = [n for n in numbers_of(value) or [value] if isinstance(n, int | float)]
            raise UsageError(f"{flag(name)} {shown(value)}: {range.reason(*numbers)}")
    for relation in RELATIONS:
        if relation.group != group or relation.choice not in ("", choice):
            continue
        value = getattr(options, relation.option, None)
        if value is None or any(of != group and cfg is None for of, _ in relation.others):
            continue
        others = [
            getattr(options if of == group else cfg[of], name, None) for of, name in relation.others
        ]
        if not relation.holds(numbers_of(value) or value, *others):
            reason = relation.reason.format(*map(shown, others))
            raise UsageError(f"{flag(relation.option)} {shown(value)}: {reason}")


def is_transformer(options: Any) -> bool:
    """Whether a model's options are those of one of fairseq's Transformers: other models have
    options of the same names."""
    name = getattr(options, "_name", None) or getattr(options, "arch", None)
    cls = models.ARCH_MODEL_REGISTRY.get(name) or models.MODEL_REGISTRY.get(name)
    kinds = (TransformerLanguageModel, TransformerModelBase)
    return isinstance(cls, type) and issubclass(cls, kinds)


def all_hold(range: Range, value: Any) -> bool:
    """Whether a number, or each one of a list, is in a range."""
    if not range.length:
        # A string is another kind of option of the same name.
        return isinstance(value, str) or range.holds(value)
    numbers = numbers_of(value)
    if not numbers or range.length not in (-1, len(numbers)):
        return False
    return all(map(range.holds, numbers))


def numbers_of(value: Any) -> list[Any] | None:
    """The numbers of a list, or of its text; ``None``: it is neither."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except PARSE_ERRORS:
            return None
        if isinstance(value, int | float):
            return [value]
    return list(value) if isinstance(value, list | tuple | ListConfig) else None
