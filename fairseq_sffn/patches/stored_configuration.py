"""What the configuration that a checkpoint holds may say.

fairseq builds the task, the model and the criterion that a stored configuration names, evaluates
some of its strings as Python and opens the files that others name. A checkpoint can come from
anybody, so only the names below are accepted; numbers, switches and choices are accepted by the
types of the registered options; and a string is accepted by a rule for its option, or not at all.
What names a file or folder is replaced by the option's default: the caller says where files are.
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
"""Group of options -> what it may name. Models are told by their class."""

FILES = frozenset(
    (
        *("data", "plasma_path", "tensorboard_logdir", "encoder_embed_path", "decoder_embed_path"),
        *("sentencepiece_model", "sentencepiece_model_path", "bpe_codes"),
        *("gpt2_encoder_json", "gpt2_vocab_bpe", "use_plasma_view", "tpu"),
    )
)
"""Options that name files, folders, addresses or devices, which fairseq would open."""


GROUPS: dict[str, Any] = {
    name: group.type
    for name, group in FairseqConfig.__dataclass_fields__.items()
    if is_dataclass(group.type)
}
"""Groups of options that every command has -> their dataclasses."""
BUILT = ("model", "task", "criterion", "tokenizer", "bpe")
"""Groups from which loading builds something. What an option may not be is refused there, and
replaced by the option's default elsewhere."""
RECORDED = ("optimizer", "lr_scheduler", "scoring")
"""Groups from which loading builds nothing."""


def safe_state(state: dict[str, Any], path: str, overrides: Mapping[str, Any]) -> None:
    """Replace the configuration in a checkpoint by what it may say, in place.

    Args:
        state: what :func:`.reading.read_file` read.
        path: the file, for messages.
        overrides: options that the caller gives; files that a tokenizer needs are among them.

    Raises:
        UsageError: names what is refused.
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
    """Return a configuration with what may be used of a stored one.

    Raises:
        UsageError: names what is refused.
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
    """Return whether a tokenizer or encoder cannot be built without files that the caller does not
    name, and say so."""
    files = [name for name in options or () if name in FILES and name not in given]
    if files and options is not None:
        logger.warning(
            f"the checkpoint's {group}, {options['_name']}, is left out: its files are opened only "
            f"if you name them ({', '.join(files)})"
        )
    return bool(files)


def safe_arguments(stored: Namespace, overrides: Mapping[str, Any]) -> Namespace:
    """Return what may be used of the arguments that fairseq before 0.10 stored in place of a
    configuration.

    Args:
        stored: the arguments.
        overrides: options that the caller gives.

    Raises:
        UsageError: names what is refused.
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
            if dataclass is Bare:  # fairseq cannot read these of a Namespace
                logger.warning(f"the checkpoint's {group}, {name}, is left out: name it yourself")
            elif not lacks_files(group, {**options, "_name": name}, overrides):
                result = {**options, **result, group: name}
    return Namespace(**result)


def options_of(group: str, stored: Any) -> dict[str, Any]:
    """Return the options of a group, which fairseq stores as a dictionary or a ``Namespace``."""
    options = vars(stored) if isinstance(stored, Namespace) else stored
    if not isinstance(options, dict):
        raise UsageError(f"its {group} is not a group of options")
    return options


def dataclass_of(group: str, name: Any) -> type | None:
    """Return the dataclass with the options of what a group names; ``None`` where nothing is to be
    kept of it.

    Raises:
        UsageError: a checkpoint may not name this.
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
    """What is built without options."""

    __dataclass_fields__: typing.ClassVar[dict[str, Field[Any]]] = {}


def safe_options(group: str, stored: Any, dataclass: type) -> dict[str, Any]:
    """Return the options of a dataclass that a group may set.

    Options that the dataclass does not have are left out, as fairseq does.

    Raises:
        UsageError: names an option and a value from which something would be built.
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
    """Yield the options of a dataclass, without the name of what has them."""
    of_dataclass = fields(dataclass) if is_dataclass(dataclass) else ()
    return (option for option in of_dataclass if option.name != "_name")


def types_of(option: Field[Any]) -> tuple[Any, ...]:
    """Return the type of an option; of an optional one, without ``None``."""
    union = typing.get_origin(option.type) is typing.Union
    return tuple(
        kind for kind in (typing.get_args(option.type) if union else (option.type,)) if kind
    )


def accepts(option: Field[Any], value: Any) -> bool:
    """Return whether a checkpoint may say this of an option."""

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
    """Return an option's default; where it is an option that every command has, that one's; where
    it is another option of a model, ``None``."""
    default = option.default_factory() if callable(option.default_factory) else option.default
    if isinstance(default, str) and (other := re.fullmatch(r"\$\{(\w+)\.(\w+)\}", default)):
        group, name = other.groups()
        known = GROUPS[group].__dataclass_fields__ if group in GROUPS else {}
        return default_of(known[name]) if name in known else None
    return default


def short(value: Any) -> str:
    """Return a value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
