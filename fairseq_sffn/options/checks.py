"""Checks of a configuration: each number against its range, and options against each other."""

from __future__ import annotations

import ast
from typing import Any

from fairseq import models
from fairseq.models.transformer import TransformerModelBase
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY
from omegaconf import DictConfig, ListConfig

from ..errors import UsageError, flag, shown
from .ranges import RANGES, Range
from .relations import RELATIONS

PARSE_ERRORS = (ValueError, SyntaxError, OverflowError, MemoryError, RecursionError)
"""Errors that parsing the text of numbers can raise."""


def check_ranges(cfg: Any) -> None:
    """Check every option group of a configuration.

    Raises:
        UsageError: an option is out of its range. The message names the first such option.
    """
    for group in RANGES:
        if " " not in group and cfg.get(group) is not None:
            check_group(group, cfg[group], cfg)


def check_group(group: str, options: Any, cfg: Any = None) -> None:
    """Check the options of one group.

    Args:
        group: a key of ``RANGES``.
        options: the options of the group.
        cfg: the whole configuration; ``None``: only the options of the group are known.

    Raises:
        UsageError: an option is out of its range, or contradicts another option. The message names
            the first such option.
    """
    choice = str(getattr(options, "_name", None))
    cls = class_of(group, options)
    # The options of other models, and of other plugins, may have another meaning.
    if not is_known(cls) or (group == "model" and not is_transformer(cls)):
        return
    for name, range in {**RANGES[group], **RANGES.get(f"{group} {choice}", {})}.items():
        value = value_of(options, name)
        if value is not None and not all_hold(range, value):
            numbers = [n for n in numbers_of(value) or [value] if isinstance(n, int | float)]
            raise UsageError(f"{flag(name)} {shown(value)}: {range.reason(*numbers)}")
    for relation in RELATIONS:
        if relation.group != group or relation.choice not in ("", choice):
            continue
        value = value_of(options, relation.option)
        if value is None or any(of != group and cfg is None for of, _ in relation.others):
            continue
        others = [
            value_of(options if of == group else cfg[of], name) for of, name in relation.others
        ]
        if not relation.holds(numbers_of(value) or value, *others):
            reason = relation.reason.format(*map(shown, others))
            raise UsageError(f"{flag(relation.option)} {shown(value)}: {reason}")


def value_of(options: Any, name: str) -> Any:
    """Return the value of an option; ``None``: there is none.

    ``getattr`` would make an exception with a long message for each option that a configuration
    does not have.
    """
    if isinstance(options, DictConfig) and name not in options:
        return None
    return getattr(options, name, None)


def class_of(group: str, options: Any) -> Any:
    """Return the registered class that a group chooses; ``None``: there is none."""
    name = getattr(options, "_name", None) or getattr(options, "arch", None)
    if group == "model":
        return models.ARCH_MODEL_REGISTRY.get(name) or models.MODEL_REGISTRY.get(name)
    if group == "task":
        return TASK_REGISTRY.get(name)
    return REGISTRIES.get(group, {}).get("registry", {}).get(name)


def is_known(cls: Any) -> bool:
    """Return whether a class belongs to fairseq or to this plugin, or is ``None``.

    A class that is derived from one of this plugin belongs to it.
    """

    def package(cls: type) -> str:
        return cls.__module__.partition(".")[0]

    ours = isinstance(cls, type) and "fairseq_sffn" in map(package, cls.__mro__)
    return cls is None or ours or package(cls) == "fairseq"


def is_transformer(cls: Any) -> bool:
    """Return whether a class is a subclass of one of fairseq's Transformers."""
    kinds = (TransformerLanguageModel, TransformerModelBase)
    return isinstance(cls, type) and issubclass(cls, kinds)


def all_hold(range: Range, value: Any) -> bool:
    """Return whether a number, or each number of a list, is in a range."""
    if not range.length:
        # A string is another kind of option of the same name.
        return isinstance(value, str) or range.holds(value)
    numbers = numbers_of(value)
    if not numbers or range.length not in (-1, len(numbers)):
        return False
    return all(map(range.holds, numbers))


def numbers_of(value: Any) -> list[Any] | None:
    """Return the numbers of a list, or of the text of a list; ``None``: the value is neither."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except PARSE_ERRORS:
            return None
        if isinstance(value, int | float):
            return [value]
    return list(value) if isinstance(value, list | tuple | ListConfig) else None
