"""Rules for the configuration in a checkpoint.

fairseq builds the task, the model and the criterion that a stored configuration names. It evaluates
some strings as Python, and opens the files that other strings name. A checkpoint may come from
anybody. Therefore:

- A configuration may only name the tasks, criterions, tokenizers and encoders below, and models of
  known classes.
- Numbers, switches and choices must have the types of the registered options.
- A string must follow the rule for its option (:mod:`..checkpoints.stored_strings`).
- Names of files and folders are replaced by the option's default. The caller says where files are.
"""

from __future__ import annotations

import logging
import re
import typing
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from typing import Any

from fairseq import models, registry, tasks
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel

from ..checkpoints.stored_strings import STRINGS, TOKENIZERS, is_nothing, is_number
from ..errors import UsageError, flag
from ..models.config import TranslationConfig
from ..models.plugin_model import PluginModel
from ..options.checks import check_group

logger = logging.getLogger(__name__)

TASKS = ("language_modeling", "sffn_language_modeling", "translation")
CRITERIONS = (
    *("cross_entropy", "adaptive_loss", "label_smoothed_cross_entropy"),
    *("sffn_cross_entropy", "sffn_label_smoothed_cross_entropy"),
)
BPES = ("sentencepiece", "gpt2", "subword_nmt", "fastbpe", "byte_bpe", "bytes", "characters")
NAMES: dict[str, tuple[str, ...]] = {
    "task": TASKS,
    "criterion": CRITERIONS,
    "tokenizer": TOKENIZERS,
    "bpe": BPES,
}
"""Option group -> names that it may choose. Models are accepted by their class."""

FILES = frozenset(
    (
        *("data", "plasma_path", "tensorboard_logdir", "encoder_embed_path", "decoder_embed_path"),
        *("sentencepiece_model", "sentencepiece_model_path", "bpe_codes"),
        *("gpt2_encoder_json", "gpt2_vocab_bpe", "use_plasma_view", "tpu"),
    )
)
"""Options that name files, folders, addresses or devices that fairseq would open."""


GROUPS: dict[str, Any] = {
    name: group.type
    for name, group in FairseqConfig.__dataclass_fields__.items()
    if is_dataclass(group.type)
}
"""Option group that every command has -> dataclass."""
BUILT = ("model", "task", "criterion", "tokenizer", "bpe")
"""Option groups from which loading builds an object. Wrong values are refused in these groups, and
replaced by defaults in other groups."""
RECORDED = ("optimizer", "lr_scheduler", "scoring")
"""Option groups from which loading builds no object."""


def safe_state(state: dict[str, Any], path: str, overrides: Mapping[str, Any]) -> None:
    """Replace the configuration in a checkpoint by its accepted options, in place.

    Args:
        state: content of the checkpoint; see :func:`~..checkpoints.reading.read_file`.
        path: the file, for messages.
        overrides: options of the caller, such as the files of a tokenizer.

    Raises:
        UsageError: the configuration is refused. The message names the option and the value.
    """
    try:
        if state.get("cfg") is not None:
            state["cfg"] = safe_configuration(state["cfg"], overrides)
        if state.get("args") is not None:
            state["args"] = safe_arguments(state["args"], overrides)
    except UsageError as error:
        raise UsageError(
            f"checkpoint {path}: refused, {error}; if you trust where it comes from, add "
            "--trust-checkpoint"
        ) from error


def safe_configuration(stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the accepted options of a stored one.

    Args:
        stored: the stored configuration.
        overrides: options of the caller.

    Raises:
        UsageError: the configuration is refused.
    """
    result: dict[str, Any] = {}
    for group, dataclass in GROUPS.items():
        if stored.get(group) is not None:
            result[group] = safe_options(group, stored[group], dataclass)
    for group in (*BUILT, *RECORDED):
        result[group] = None
        if (options := stored.get(group)) is None:
            if group in ("model", "task"):
                raise UsageError(f"its {group} is None")
            continue
        if isinstance(options, str):  # an encoder without options
            options = {"_name": options}
        options = options_of(group, options)
        name = options.get("_name", options.get("arch") if group == "model" else None)
        if (dataclass := dataclass_of(group, name)) is not None:
            result[group] = {**safe_options(group, options, dataclass), "_name": name}
    for group in ("tokenizer", "bpe"):
        if lacks_files(group, result[group], overrides):
            result[group] = None
    check_group("task", Namespace(**(result["task"] or {})))
    if isinstance(stored.get("model"), Namespace):
        result["model"] = Namespace(**result["model"], arch=result["model"]["_name"])
    return result


def lacks_files(group: str, options: Mapping[str, Any] | None, given: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer or encoder needs files that the caller does not name.

    The function logs a warning in this case.

    Args:
        group: ``tokenizer`` or ``bpe``.
        options: the options of the group.
        given: options of the caller.
    """
    files = [name for name in options or () if name in FILES and name not in given]
    if files and options is not None:
        logger.warning(
            f"the checkpoint's {group}, {options['_name']}, is left out: its files are opened only "
            f"if you name them ({', '.join(files)})"
        )
    return bool(files)


def safe_arguments(stored: Namespace, overrides: Mapping[str, Any]) -> Namespace:
    """Return the accepted options of stored arguments.

    fairseq before 0.10 stored arguments instead of a configuration.

    Args:
        stored: the arguments.
        overrides: options of the caller.

    Raises:
        UsageError: the arguments are refused.
    """
    given = vars(stored)
    result: dict[str, Any] = {}
    for group in ("model", "task", "criterion"):
        key = "arch" if group == "model" else group
        name = given.get(key, "translation" if group == "task" else None)
        needed = name is not None or group == "model"
        if needed and (dataclass := dataclass_of(group, name)) is not None:
            result |= safe_options(group, given, dataclass) | {key: name}
    for group in ("tokenizer", "bpe"):
        if (name := given.get(group)) is not None and (dataclass := dataclass_of(group, name)):
            options = safe_options(group, given, dataclass)
            if dataclass is Bare:  # fairseq cannot read these options from a Namespace
                logger.warning(f"the checkpoint's {group}, {name}, is left out: name it yourself")
            elif not lacks_files(group, {**options, "_name": name}, overrides):
                result = {**options, **result, group: name}
    return Namespace(**result)


def options_of(group: str, stored: Any) -> dict[str, Any]:
    """Return the options of a group, which is stored as a dictionary or a ``Namespace``.

    Raises:
        UsageError: the group is neither.
    """
    options = vars(stored) if isinstance(stored, Namespace) else stored
    if not isinstance(options, dict):
        raise UsageError(f"its {group} is not a group of options")
    return options


def dataclass_of(group: str, name: Any) -> type | None:
    """Return the dataclass with the options of a group's choice; ``None``: no option is kept.

    Args:
        group: the option group.
        name: the choice.

    Raises:
        UsageError: a checkpoint may not choose this name.
    """
    known = isinstance(name, str)
    if group == "model":
        found = None
        if known:
            found = models.MODEL_REGISTRY.get(name) or models.ARCH_MODEL_REGISTRY.get(name)
        if found is not None and issubclass(found, PluginModel):
            return found.config_class
        if found is TransformerLanguageModel:
            return models.MODEL_DATACLASS_REGISTRY["transformer_lm"]
        if found is TransformerModel:
            return TranslationConfig  # the same options
    elif group in RECORDED:
        return registry.REGISTRIES[group]["dataclass_registry"].get(name) if known else None
    elif known and name in NAMES[group]:
        if group == "task":
            return tasks.TASK_DATACLASS_REGISTRY[name]
        return registry.REGISTRIES[group]["dataclass_registry"].get(name, Bare)
    raise UsageError(f"its {group} is {short(name)}")


class Bare:
    """Options of a tokenizer or encoder that has none."""

    __dataclass_fields__: typing.ClassVar[dict[str, Field[Any]]] = {}


def safe_options(group: str, stored: Any, dataclass: type) -> dict[str, Any]:
    """Return the accepted options of a group.

    Options that the dataclass does not have are left out, as in fairseq.

    Args:
        group: the option group.
        stored: its stored options.
        dataclass: the dataclass with the types of the options.

    Raises:
        UsageError: a value is not accepted, and an object would be built from it. The message names
            the option and the value.
    """
    options = options_of(group, stored)
    result = {}
    for option in options_in(dataclass):
        name = option.name
        if name not in options:
            continue
        value, default = options[name], default_of(option)
        if name in FILES:
            value = default
        elif not accepts(option, value) and not (type(value) is type(default) and value == default):
            if group in BUILT:
                raise UsageError(f"its {flag(name)} is {short(value)}")
            value = default
        result[name] = value
    return result


def options_in(dataclass: type) -> Iterator[Field[Any]]:
    """Return the options of a dataclass without ``_name``."""
    of_dataclass = fields(dataclass) if is_dataclass(dataclass) else ()
    return (option for option in of_dataclass if option.name != "_name")


def types_of(option: Field[Any]) -> tuple[Any, ...]:
    """Return the types of an option, without ``None``."""
    union = typing.get_origin(option.type) is typing.Union
    return tuple(
        kind for kind in (typing.get_args(option.type) if union else (option.type,)) if kind
    )


def accepts(option: Field[Any], value: Any) -> bool:
    """Return whether a checkpoint may set an option to a value."""

    def is_a(kind: Any) -> bool:
        if isinstance(value, str):
            if isinstance(kind, type) and issubclass(kind, Enum):
                return value in {choice.value for choice in kind}
            return kind in (str, Any) and STRINGS.get(option.name, is_nothing)(value)
        if isinstance(value, list | tuple):
            return all(map(is_number, value)) and (
                kind in (str, Any) or typing.get_origin(kind) is list
            )
        if kind is int:
            return is_number(value) and value == value // 1
        if kind is float:
            return is_number(value)
        return kind in (bool, Any) and isinstance(value, bool)

    if value is None:
        return type(None) in typing.get_args(option.type) or default_of(option) is None
    return any(map(is_a, types_of(option)))


def default_of(option: Field[Any]) -> Any:
    """Return the default of an option.

    If the default refers to an option that every command has, the result is the default of that
    option. If it refers to another option, the result is ``None``.
    """
    default = option.default_factory() if callable(option.default_factory) else option.default
    if isinstance(default, str) and (other := re.fullmatch(r"\$\{(\w+)\.(\w+)\}", default)):
        group, name = other.groups()
        known = GROUPS[group].__dataclass_fields__ if group in GROUPS else {}
        return default_of(known[name]) if name in known else None
    return default


def short(value: Any) -> str:
    """Return a value as text for a message, at most about 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
