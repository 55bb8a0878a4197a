"""Patches of the functions with which fairseq parses command lines."""

from __future__ import annotations

import argparse
import functools
import typing
from collections.abc import Callable
from typing import Any

from fairseq import utils
from fairseq.models import ARCH_MODEL_REGISTRY

from ..checkpoints.loading import FLAGS, add_flags_to
from ..errors import UsageError
from ..models.transformer_lm import DenseTransformerLM
from ..options.checks import PARSE_ERRORS
from ..options.waiting import add_peer_timeout
from .registry import MENDS_FAIRSEQ, NEEDED, patch


@patch(
    "fairseq.options:parse_args_and_arch",
    why="Commands lack --trust-checkpoint, --skip-checksums and --peer-timeout. With --bf16, they "
    "look for a TPU.",
    until="fairseq lets a plugin add flags to its commands, and does not set `tpu` itself.",
    kind=NEEDED,
    written_for=("062b66d9",),
)
def parse_args_and_arch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags for checkpoints and processes, and run ``--bf16`` on the GPU or CPU."""

    @functools.wraps(original)
    def wrapper(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        # The function calls itself with the same parser.
        if not FLAGS.keys() & parser._option_string_actions.keys():
            add_flags_to(parser.add_argument_group("checkpoints"))
            add_peer_timeout(parser.add_argument_group("processes"))
        parsed = original(parser, *args, **kwargs)
        namespace = parsed[0] if isinstance(parsed, tuple) else parsed
        if utils.xm is None and getattr(namespace, "bf16", False):
            namespace.tpu = False
        check_task(namespace)
        return parsed

    return wrapper


def check_task(options: argparse.Namespace) -> None:
    """Refuse a task without the options that a language model of the plugin reads.

    fairseq's default task is translation.

    Args:
        options: the parsed options of a command.

    Raises:
        UsageError: the architecture is a language model and the task is not of language modeling.
    """
    arch = getattr(options, "arch", None)
    model = ARCH_MODEL_REGISTRY.get(arch, object)
    if issubclass(model, DenseTransformerLM) and not hasattr(options, "tokens_per_sample"):
        raise UsageError(
            f"--task {options.task}: {arch} is a language model; its tasks are language_modeling "
            "and sffn_language_modeling"
        )


@patch(
    "fairseq.dataclass.utils:eval_str_list",
    why="--lr 1..2 and --update-freq 1e999 end in a traceback. --update-freq 1.5 counts as 1.",
    until="fairseq raises an error that argparse handles.",
    kind=MENDS_FAIRSEQ,
    written_for=("fe303f27",),
)
def eval_str_list(original: Callable[..., Any]) -> Callable[..., Any]:
    """Raise ``ValueError`` for wrong numbers, which argparse reports in one line."""

    @functools.wraps(original)
    def wrapper(x: Any, x_type: Any = float) -> Any:
        try:
            numbers, given = original(x, x_type), original(x, float)
        except PARSE_ERRORS as error:
            raise ValueError(str(error)) from error
        if numbers != given:
            raise ValueError(f"{x} is not of whole numbers")
        return numbers

    return wrapper


@patch(
    "fairseq.dataclass.utils:_override_attr",
    why="--lr-scheduler polynomial_decay without --total-num-update ends in a traceback: an option "
    "whose default refers to another option becomes null.",
    until="fairseq keeps the default of such an option.",
    kind=MENDS_FAIRSEQ,
    written_for=("55477efc",),
)
def _override_attr(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the default of a number that refers to another option."""

    @functools.wraps(original)
    def wrapper(sub_node: str, data_class: Any, args: Any) -> list[str]:
        nothing = {
            f"{sub_node}.{name}=null"
            for name, field in getattr(data_class, "__dataclass_fields__", {}).items()
            if str(field.default).startswith("${") and type(None) not in typing.get_args(field.type)
        }
        return [line for line in original(sub_node, data_class, args) if line not in nothing]

    return wrapper
