"""Reads and checks the declarative files of a study."""

from __future__ import annotations

import math
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..errors import UsageError
from .plan import REFERENCE, Cell, Launcher, Scale, Table, train_arguments

T = TypeVar("T")

KINDS = ("taxonomy", "perplexity", "balance", "zero_shot", "routing")
"""Kinds of tables; see :mod:`fairseq_sffn.study.tables`."""

FIGURES = ("", "lines", "flops", "load", "gap", "routing", "bars")
"""Kinds of figures; see :mod:`fairseq_sffn.study.figures`."""

ABOVE_ZERO = {
    *("updates", "batch_size", "tokens_per_sample", "ffn_embed_dim", "dictionary"),
    *("learning_rates", "tokens_per_second", "relative_time", "processes", "update_freq"),
    *("length", "batch", "lr", "sweep_share", "warmup_share", "save_interval"),
}
"""Keys whose numbers are above 0."""

REFUSED = {
    **dict.fromkeys(("--no-save", "--no-last-checkpoints"), "the last checkpoint is evaluated"),
    **dict.fromkeys(
        (
            *("--max-epoch", "--stop-time-hours", "--stop-min-lr", "--patience"),
            *("--no-save-optimizer-state", "--restore-file", "--finetune-from-model"),
            *("--reset-optimizer", "--reset-lr-scheduler", "--reset-dataloader", "--reset-meters"),
        ),
        "trainings end after their updates, and go on where they were stopped",
    ),
    **dict.fromkeys(
        ("--train-subset", "--valid-subset", "--gen-subset", "--combine-valid-subsets"),
        "trainings read the splits train and valid of the scale's data",
    ),
}
"""Flags that no training may have, and why."""


def read(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error


def read_named(path: Path) -> dict[str, Any]:
    """A TOML file, and its name.

    Raises:
        UsageError: it cannot be read, or has a name of its own.
    """
    values = read(path)
    if "name" in values:
        raise UsageError(f"{path}: name {values['name']!r}: the file's name is it")
    return {"name": path.stem, **values}


def build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """An object of one of the classes above.

    Raises:
        UsageError: a key is unknown or missing, or its value is none that it can have.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - known.keys()):
        names = ", ".join(name for name in known if name != "name")  # that is the file's
        raise UsageError(f"{where}: {unknown[0]}: is none of {names}")
    needed = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - values.keys()):
        raise UsageError(f"{where}: {missing[0]}: is missing")
    hints = get_type_hints(kind)
    found = {n: convert(value, hints[n], f"{where}: {n}") for n, value in values.items()}
    for name in ABOVE_ZERO & found.keys():
        if any(number <= 0 for number in numbers(found[name])):
            raise UsageError(f"{where}: {name} {values[name]!r}: must be above 0")
    return kind(**found)


def convert(value: Any, hint: Any, where: str) -> Any:
    """A value of a TOML file as a field's type.

    Raises:
        UsageError: it is of another type.
    """
    items = get_args(hint)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(convert(item, items[0], f"{where}[{i}]") for i, item in enumerate(value))
    if get_origin(hint) is Mapping and isinstance(value, dict):
        return {key: convert(item, items[1], f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(hint) and isinstance(value, dict):
        return build(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) in (tuple, Mapping) or not any(is_of(value, k) for k in items or [hint]):
        raise UsageError(f"{where} {value!r}: must be {described(hint)}")
    whole = type(value) is int and int not in (items or [hint])
    return float(value) if whole else value  # 1 and 1.0 are the same setting


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a simple type. A whole number may stand for one with a fraction."""
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind  # a bool is no int


def described(hint: Any) -> str:
    """A field's type in words."""
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    if get_origin(hint) is tuple:
        return "a list"
    if get_origin(hint) is Mapping or is_dataclass(hint):
        return "a table"
    return " or ".join(names[one] for one in get_args(hint) or [hint] if one is not NoneType)


def numbers(value: Any) -> Iterable[float]:
    """The numbers of a key that may have none, or several."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, tuple) else [value]


def split_flags(flags: str, where: str) -> list[str]:
    """Flags as a shell splits them, but none that :func:`train_arguments` sets.

    Raises:
        UsageError: a quote is left open, or it is one of these.
    """
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise UsageError(f"{where}: flags {flags!r}: {error}") from error
    cell = Cell("", "", seed=1, lr=1.0, updates=1, batch_size=1)
    scale = Scale("", "", "", 1, 1, 1, 1, 1, (1.0,), flags="", tokens_per_second=1.0)
    ours = {w for w in train_arguments(cell, scale, Launcher(), "", "", "") if w.startswith("--")}
    ours |= {"--max-tokens", "--max-sentences", "-a"}  # the last are --batch-size and --arch
    for word in words:
        name = word.partition("=")[0]
        if name in ours:
            raise UsageError(f"{where}: flags: {word}: is set by what the file says elsewhere")
        if name in REFUSED:
            raise UsageError(f"{where}: flags: {word}: {REFUSED[name]}")
    return words


def load_scale(path: Path) -> Scale:
    """The scale that a file describes.

    Raises:
        UsageError: it does not.
    """
    values = read_named(path)
    scale = build(Scale, values, str(path))
    for name in ("learning_rates", "launchers"):
        if not getattr(scale, name):
            raise UsageError(f"{path}: {name}: is empty")
    for name in ("sweep_share", "warmup_share"):
        if getattr(scale, name) > 1:
            raise UsageError(f"{path}: {name} {getattr(scale, name):g}: must be at most 1")
    return replace(scale, flags=shlex.join(split_flags(scale.flags, str(path))))


def load_table(path: Path) -> Table:
    """The table that a file describes. ``seeds`` beside the rows are those of all rows that name
    none.

    Raises:
        UsageError: it does not describe one.
    """
    values = read_named(path)
    seeds = values.pop("seeds", [1])
    if isinstance(rows := values.get("rows"), list):
        values["rows"] = [{"seeds": seeds, **r} if isinstance(r, dict) else r for r in rows]
    table = build(Table, values, str(path))
    for name, known in (("kind", KINDS), ("figure", FIGURES)):
        if (value := getattr(table, name)) not in known:
            raise UsageError(
                f"{path}: {name} {value!r}: is none of {', '.join(filter(None, known))}"
            )
    if table.kind == "zero_shot" and not table.zero_shot:
        raise UsageError(f"{path}: kind 'zero_shot': needs zero_shot = true")
    labels = [row.label for row in table.rows]
    if not labels:
        raise UsageError(f"{path}: rows: there are none")
    for i, row in enumerate(table.rows):
        where = f"{path}: row {row.label!r}"
        if row.label in labels[:i]:
            raise UsageError(f"{path}: label {row.label!r}: is that of two rows")
        if len(set(row.seeds)) < len(row.seeds):
            raise UsageError(f"{where}: seeds {list(row.seeds)}: are not all different")
        if not row.seeds and table.kind != "taxonomy":
            raise UsageError(f"{where}: seeds: is empty")
        if row.x not in ("", "{ffn}") and not isinstance(row.x, int | float):
            raise UsageError(f"{where}: x {row.x!r}: must be a number or '{{ffn}}'")
        if isinstance(row.x, int | float) and row.x <= 0:  # axes are logarithmic
            raise UsageError(f"{where}: x {row.x:g}: must be above 0")
        split_flags(row.flags, where)
    if table.figure == "lines" and not any(row.group and row.x != "" for row in table.rows):
        raise UsageError(f"{path}: figure 'lines': no row has both group and x")
    if table.figure == "gap" and not {REFERENCE} < {row.group for row in table.rows if row.group}:
        raise UsageError(f"{path}: figure 'gap': needs rows of group {REFERENCE!r} and of another")
    for claim in table.claims:
        for label in (claim.better, claim.worse):
            if label not in labels:
                raise UsageError(f"{path}: claim about {label!r}: is the label of no row")
    return table
