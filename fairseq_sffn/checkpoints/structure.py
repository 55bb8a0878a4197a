"""Description of the content of a checkpoint, and the check against it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.logging import meters

from ..errors import UsageError

METERS = {
    name
    for name, kind in vars(meters).items()
    if isinstance(kind, type) and issubclass(kind, meters.Meter)
}
"""Names of fairseq's meter classes. fairseq looks up a class by the name in the checkpoint."""


@dataclass(frozen=True)
class Value:
    """A value for which ``accepts`` is true. ``is_a`` describes it in words."""

    is_a: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Record:
    """A dictionary with named entries. It may have other entries.

    Attributes:
        required: name -> kind of the entries that must be there.
        optional: name -> kind of the entries that may be there.
        together: names of the optional entries that must be there together, or not at all.
    """

    required: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)
    together: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A dictionary from names to values of one kind."""

    of: Any


@dataclass(frozen=True)
class Sequence:
    """A list or tuple of at least ``least`` items of one kind."""

    of: Any
    least: int = 0


@dataclass(frozen=True)
class Either:
    """A value of one of several kinds. The last kind gives the error message."""

    kinds: tuple[Any, ...]


def of_type(is_a: str, *types: type) -> Value:
    """Return the kind of values of the given types. A ``bool`` does not count as an ``int``."""
    return Value(
        is_a, lambda v: isinstance(v, types) and not (isinstance(v, bool) and bool not in types)
    )


ANYTHING = Value("anything", lambda _: True)
NOTHING = Value("None", lambda value: value is None)
TEXT = of_type("a string", str)
INTEGER = of_type("an integer", int)
COUNT = Value("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0)
NUMBER = Value(
    "a number",  # in several processes, fairseq keeps some in tensors
    lambda v: (
        (isinstance(v, int | float) and not isinstance(v, bool))
        or (isinstance(v, torch.Tensor) and v.numel() == 1)
    ),
)
TENSOR = of_type("a tensor", torch.Tensor)
DICTIONARY = of_type("a dictionary", dict)


def optional(kind: Any) -> Either:
    """Return the kind of values that are ``None`` or of ``kind``."""
    return Either((NOTHING, kind))


def is_state_of_parameter(entry: tuple[Any, Any]) -> bool:
    """Return whether an entry of an optimizer's state is well formed.

    Args:
        entry: number of a parameter, and the optimizer's state of the parameter.
    """
    number, kept = entry
    return (
        isinstance(number, int)
        and isinstance(kept, dict)
        and all(torch.is_tensor(kept[name]) for name in ("exp_avg", "exp_avg_sq") if name in kept)
    )


OPTIMIZER_STATE = Record(
    optional={
        "state": Value(
            "a dictionary of the parameters' states",
            lambda v: isinstance(v, dict) and all(map(is_state_of_parameter, v.items())),
        ),
        "param_groups": Sequence(Record({"params": Sequence(INTEGER)}), least=1),
        "loss_scale": NUMBER,
    }
)
FOLDER = Value(
    "the name of a folder",
    lambda v: isinstance(v, str) and re.fullmatch(r"(shards|resharded)-[\w. -]+", v) is not None,
)
SHARDS = Value(
    "a number of parts", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 2
)
METER = Value(
    "a meter (priority, name, class, state)",
    lambda v: (
        isinstance(v, list | tuple)
        and len(v) == 4
        and isinstance(v[0], int)
        and isinstance(v[1], str)
        and isinstance(v[2], str)
        and v[2] in METERS
        and isinstance(v[3], dict)
    ),
)

CHECKPOINT = Record(
    required={
        "model": Table(TENSOR),
        "optimizer_history": Sequence(
            Record(
                optional={
                    "criterion_name": TEXT,
                    "optimizer_name": TEXT,
                    "lr_scheduler_state": optional(DICTIONARY),
                    "num_updates": COUNT,
                }
            ),
            least=1,
        ),
        "extra_state": Record(
            optional={
                "train_iterator": Record({"epoch": COUNT}, {"iterations_in_epoch": COUNT}),
                "metrics": Table(Sequence(METER)),
                "previous_training_time": NUMBER,
                "best": NUMBER,
                "val_loss": optional(NUMBER),
                "ema": optional(Table(TENSOR)),
                "early_stopping": Record({"best": NUMBER, "num_runs": COUNT}),
                "loss_scaler": Table(NUMBER),
            }
        ),
    },
    optional={
        "args": optional(of_type("a Namespace", argparse.Namespace)),
        "cfg": optional(DICTIONARY),
        "criterion": optional(Table(TENSOR)),
        "task_state": DICTIONARY,
        "last_optimizer_state": optional(OPTIMIZER_STATE),
        "sffn": Record(
            {"parameters": Sequence(TEXT), "sharded": Sequence(TEXT)},
            {"folder": FOLDER, "shards": SHARDS, "fingerprint": TEXT, "integers": TEXT},
            together=("folder", "shards"),
        ),
    },
)
"""Content of a checkpoint: fairseq's entries, and the plugin's entry ``sffn``."""

AVERAGED = Record({"extra_state": Record({"ema": Table(TENSOR)})})
"""Content that a checkpoint needs for the use of its moving average."""

PART = Record(
    {
        "model": Table(TENSOR),
        "optimizer": Table(DICTIONARY),
        "folder": FOLDER,
        "shard": COUNT,
        "shards": SHARDS,
    }
)
"""Content of the file of one part."""


def check_structure(state: Any, path: str, kind: Record = CHECKPOINT) -> None:
    """Check the content of a file.

    Args:
        state: the content.
        path: the file, for the message.
        kind: the expected content.

    Raises:
        UsageError: the content differs. The message names the first difference.
    """
    if problem := find_problem(state, kind):
        what = "a checkpoint of fairseq" if kind is CHECKPOINT else "a part of a checkpoint"
        raise UsageError(f"checkpoint {path}: not {what}: {problem}")


def find_problem(value: Any, kind: Any, where: str = "") -> str | None:
    """Return in words how a value differs from a kind; ``None``: it does not.

    Args:
        value: the value.
        kind: the expected kind.
        where: path of names to the value, for the message.
    """
    here = where or "it"
    if isinstance(kind, Value):
        return None if kind.accepts(value) else f"{here} is not {kind.is_a}"
    if isinstance(kind, Either):
        problems = [find_problem(value, one, where) for one in kind.kinds]
        return problems[-1] if all(problems) else None
    if isinstance(kind, Sequence):
        if not isinstance(value, list | tuple):
            return f"{here} is not a list"
        if len(value) < kind.least:
            return f"{here} is empty"
        entries = {f"{where}[{i}]": (item, kind.of) for i, item in enumerate(value)}
    elif not isinstance(value, dict):
        return f"{here} is not a dictionary"
    elif isinstance(kind, Table):
        if not all(isinstance(name, str) for name in value):
            return f"{here} has an entry without a name"
        entries = {f"{where}.{name}": (item, kind.of) for name, item in value.items()}
    else:
        for name in kind.required:
            if name not in value:
                return f"{here} has no {name!r}"
        missing = [name for name in kind.together if name not in value]
        if missing and len(missing) < len(kind.together):
            return f"{here} has no {missing[0]!r}"
        kinds = {**kind.required, **kind.optional}
        entries = {
            f"{where}.{name}" if where else name: (value[name], kinds[name])
            for name in kinds
            if name in value
        }
    return next(filter(None, (find_problem(*entry, at) for at, entry in entries.items())), None)
