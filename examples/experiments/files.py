"""Reads tables and scales: TOML files, checked against the classes below.

``README.md`` describes their keys.
"""

import itertools
import json
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fairseq_sffn.errors import UsageError

T = TypeVar("T")
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

REFERENCE = "dense"
"""The dense model, and the group that a figure of gaps compares the others with."""

REFUSED = {
    "is set by what the file says elsewhere": """
        --user-dir --task --arch -a --criterion --tokens-per-sample --batch-size --max-sentences
        --max-tokens --update-freq --lr --lr-scheduler --warmup-updates --total-num-update
        --max-update --seed --save-dir --no-epoch-checkpoints --keep-interval-updates
        --save-interval-updates --validate-interval-updates --log-format --log-interval
        --distributed-world-size""",
    "the last checkpoint is evaluated": "--no-save --no-last-checkpoints",
    "runs end after their updates, and resume where they stopped": """
        --max-epoch --stop-time-hours --stop-min-lr --patience --no-save-optimizer-state
        --restore-file --finetune-from-model --reset-optimizer --reset-lr-scheduler
        --reset-dataloader --reset-meters""",
    "runs read the splits train and valid of the scale's data": """
        --train-subset --valid-subset --gen-subset --combine-valid-subsets""",
}
"""Flags of fairseq-train that no file may set, by the reason."""


SHARED = {"seeds", "lr", "init_scale"}
"""Keys of rows that may stand beside them, for all rows that do not have them."""


@dataclass(frozen=True, config=CONFIG)
class Launcher:
    """The way in which the processes of a run are started."""

    command: str = ""
    processes: Count = 1
    update_freq: Count = 1
    header: tuple[str, ...] = ()
    submit: str = ""
    at_once: Count | None = None


@dataclass(frozen=True, config=CONFIG)
class Scale:
    """Size of the models and settings of their training, the same for every row of every table."""

    name: str
    size: str
    data: str
    dictionary: Count
    updates: Count
    batch_size: Count
    tokens_per_sample: Count
    ffn_embed_dim: Count
    learning_rates: Annotated[tuple[Positive, ...], Field(min_length=1)]
    flags: str
    tokens_per_second: Positive
    init_scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    sweep_share: Share = 1 / 3
    finalists: Count = 1
    warmup_share: Share = 0.1
    save_interval: Count | None = None
    domains: str = ""
    encoder: str = ""
    requests: str = ""
    test_bytes_per_token: Positive | None = None
    relative_time: Mapping[str, Positive] = field(default_factory=dict)
    launchers: Annotated[Mapping[str, Launcher], Field(min_length=1)] = field(
        default_factory=lambda: {"local": Launcher()}
    )

    def arch(self, model: str) -> str:
        """Return the architecture of a model at this scale."""
        return "_".join(filter(None, ["transformer_lm", model, self.size]))


@dataclass(frozen=True, config=CONFIG)
class Row:
    """A row of a table: a model with flags."""

    label: str
    model: str
    flags: str = ""
    seeds: tuple[int, ...] = (1,)
    length: Positive = 1.0
    batch: Positive = 1.0
    lr: Positive | None = None
    init_scale: Positive | None = None
    sweep: bool = False
    group: str = ""
    x: Positive | Literal["", "{ffn}"] = ""


@dataclass(frozen=True, config=CONFIG)
class Claim:
    """A statement about two rows of a table: ``better`` has lower perplexity, by ``effect`` if it
    is given, a share of the perplexity of ``worse``."""

    text: str
    better: str
    worse: str
    effect: Annotated[float, Field(gt=0, lt=1)] | None = None


@dataclass(frozen=True, config=CONFIG)
class Table:
    """A table: rows, claims, and how they are shown."""

    name: str
    title: str
    kind: Literal["taxonomy", "perplexity", "balance", "zero_shot", "routing"]
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    claims: tuple[Claim, ...] = ()
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    zero_shot: bool = False
    note: str = ""
    figure: Literal["", "lines", "flops", "load", "gap", "routing", "bars"] = ""
    axis: str = ""
    trend_from: Positive | None = None


def first_error(error: ValidationError) -> str:
    """Return one line on the first thing that is wrong with some values, unknown names first."""
    unknown = "unexpected_keyword_argument"
    found = min(error.errors(), key=lambda one: one["type"] != unknown)
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in found["loc"])
    where = "".join(parts).lstrip(".")
    if found["type"] == unknown:
        return f"{where}: is unknown"
    value = "" if found["type"] in ("missing", "json_invalid") else f" {found['input']!r}"
    return f"{where}{value}: {found['msg']}".removeprefix(": ")


def read(kind: type[T], path: Path) -> T:
    """Read a TOML file as an object named like the file."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if "name" in values:
        raise UsageError(f"{path}: name {values['name']!r}: is the name of the file")
    shared = {n: values.pop(n) for n in SHARED & values.keys()} if kind is Table else {}
    if shared and isinstance(rows := values.get("rows"), list):
        values["rows"] = [shared | r if isinstance(r, dict) else r for r in rows]
    try:
        # As JSON, of which lists become tuples and objects become dataclasses.
        text = json.dumps({"name": path.stem, **values}, default=str)
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise UsageError(f"{path}: {first_error(error)}") from error


def split_flags(flags: str, where: str) -> list[str]:
    """Split flags as a shell does, and refuse those of ``REFUSED``."""
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise UsageError(f"{where}: flags {flags!r}: {error}") from error
    for word, (reason, flags) in itertools.product(words, REFUSED.items()):
        if word.partition("=")[0] in flags.split():
            raise UsageError(f"{where}: flags: {word}: {reason}")
    return words


def load_scale(path: Path) -> Scale:
    """Read a scale."""
    scale = read(Scale, path)
    return replace(scale, flags=shlex.join(split_flags(scale.flags, str(path))))


def load_table(path: Path) -> Table:
    """Read a table. What stands beside the rows (``SHARED``) is for all rows without it."""
    table = read(Table, path)
    labels, groups = [row.label for row in table.rows], {row.group for row in table.rows} - {""}

    def check(right: bool, error: str) -> None:
        if not right:
            raise UsageError(f"{path}: {error}")

    for row in table.rows:
        check(labels.count(row.label) == 1, f"label {row.label!r}: two rows have it")
        seeds = f"row {row.label!r}: seeds"
        check(
            len(set(row.seeds)) == len(row.seeds), f"{seeds} {[*row.seeds]}: are not all different"
        )
        check(bool(row.seeds) or table.kind == "taxonomy", f"{seeds}: is empty")
        split_flags(row.flags, f"{path}: row {row.label!r}")
    for label in (label for claim in table.claims for label in (claim.better, claim.worse)):
        check(label in labels, f"claim about {label!r}: no row has this label")
    on_axis = any(row.group and row.x != "" for row in table.rows)
    check(table.figure != "lines" or on_axis, "figure 'lines': no row has both group and x")
    gap = f"figure 'gap': needs rows of group {REFERENCE!r} and of another"
    check(table.figure != "gap" or {REFERENCE} < groups, gap)
    alone = table.trend_from is not None and table.figure != "gap"
    check(not alone, f"trend_from {table.trend_from}: needs figure = 'gap'")
    no_tasks = table.kind == "zero_shot" and not table.zero_shot
    check(not no_tasks, "kind 'zero_shot': needs zero_shot = true")
    return table
