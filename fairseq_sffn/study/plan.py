"""The declarative files of a study, and the trainings that they ask for."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..errors import UsageError

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

NEEDED = ("--no-save", "--no-last-checkpoints")
"""Flags without whose files nothing could be evaluated."""

REFERENCE = "dense"
"""The group that a figure of gaps compares others with."""


@dataclass(frozen=True)
class Launcher:
    """How processes are started.

    Attributes:
        command: goes before fairseq-train; ``""``: nothing.
        processes: that it starts.
        update_freq: batches that a process adds up to an update.
        header: lines of a batch script, if it is for a batch system.
        submit: the command that submits such a script.
    """

    command: str = ""
    processes: int = 1
    update_freq: int = 1
    header: tuple[str, ...] = ()
    submit: str = ""


@dataclass(frozen=True)
class Scale:
    """How large models are, and how they are trained: the same for every row of every table.

    Attributes:
        name: of the scale.
        size: suffix of the architectures, such as ``tiny``; ``""``: the default size.
        data: folder made by fairseq-preprocess, with train, valid and test splits.
        domains: folder of such folders, with a test split each, out of domain; ``""``: none.
        dictionary: types of the text's dictionary, fairseq's special ones included.
        encoder: flags of ``fairseq-sffn zero-shot`` that name what the text was encoded with.
        requests: folder of the zero-shot tasks.
        updates: of a training of length 1.
        batch_size: sequences an update, of all processes.
        tokens_per_sample: tokens of a sequence.
        ffn_embed_dim: width of the dense FFN, which ``{ffn}`` in a row's flags stands for.
        learning_rates: of the sweep.
        sweep_share: length of a training of the sweep.
        warmup_share: of the updates.
        save_interval: updates between checkpoints, and validations; ``None``: a quarter of those of
            the training.
        flags: of fairseq-train, all others.
        tokens_per_second: of the dense model, to foretell how long a study takes.
        relative_time: model -> time of a training, in units of the dense model's, where not 1.
        launchers: name -> how to start processes; the first is the default.
    """

    name: str
    size: str
    data: str
    dictionary: int
    updates: int
    batch_size: int
    tokens_per_sample: int
    ffn_embed_dim: int
    learning_rates: tuple[float, ...]
    flags: str
    tokens_per_second: float
    sweep_share: float = 1 / 3
    warmup_share: float = 0.1
    save_interval: int | None = None
    domains: str = ""
    encoder: str = ""
    requests: str = ""
    relative_time: Mapping[str, float] = field(default_factory=dict)
    launchers: Mapping[str, Launcher] = field(default_factory=lambda: {"local": Launcher()})

    def arch(self, model: str) -> str:
        """The architecture of a model at this scale."""
        return "_".join(filter(None, ["transformer_lm", model, self.size]))


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: its name there.
        model: ``transformer_lm_{model}_{size}`` is trained.
        flags: of fairseq-train, beside the scale's.
        seeds: a training each.
        length: of the training, in multiples of the scale's updates.
        batch: sequences an update, in multiples of the scale's.
        lr: learning rate; ``None``: the best of the sweep of its model.
        sweep: with its own flags, rather than its model's defaults.
        group: of rows that a figure joins.
        x: where this row stands on the figure's axis: a number, or ``{ffn}``.
    """

    label: str
    model: str
    flags: str = ""
    seeds: tuple[int, ...] = (1,)
    length: float = 1.0
    batch: float = 1.0
    lr: float | None = None
    sweep: bool = False
    group: str = ""
    x: float | str = ""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper that two rows of a table bear on.

    Attributes:
        text: the statement.
        better, worse: labels of the rows of which the first should have the lower perplexity.
    """

    text: str
    better: str
    worse: str


@dataclass(frozen=True)
class Table:
    """A table of a study.

    Attributes:
        name: of its file.
        title: above it.
        kind: how it is rendered: one of ``KINDS``.
        rows: of it.
        claims: that it bears on.
        zero_shot: whether zero-shot tasks are evaluated.
        note: below it.
        figure: one of ``FIGURES``; ``""``: none.
        axis: what the figure's horizontal axis shows.
    """

    name: str
    title: str
    kind: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    zero_shot: bool = False
    note: str = ""
    figure: str = ""
    axis: str = ""


@dataclass(frozen=True)
class Cell:
    """A training.

    Attributes:
        model, flags, seed, lr: see :class:`Row`.
        updates: of the training.
        batch_size: sequences an update.
    """

    model: str
    flags: str
    seed: int
    lr: float
    updates: int
    batch_size: int

    def settings(self, scale: Scale) -> dict[str, Any]:
        """Everything that decides what comes out, but for the text and the code."""
        shared = ("size", "tokens_per_sample", "warmup_share", "flags")
        return asdict(self) | {f"scale_{name}": getattr(scale, name) for name in shared}

    def key(self, scale: Scale) -> str:
        """A name for its files: the model, and a hash of the settings."""
        canonical = json.dumps(self.settings(scale), sort_keys=True)
        return f"{self.model}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}"

    def tokens(self, scale: Scale) -> int:
        """Tokens that it is trained on."""
        return self.updates * self.batch_size * scale.tokens_per_sample

    def expected_seconds(self, scale: Scale) -> float:
        """How long it takes on one core, or on what the scale is meant for."""
        relative = scale.relative_time.get(self.model, 1.0)
        return self.tokens(scale) * relative / scale.tokens_per_second


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
    return value


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
    ours = {*train_arguments(cell, scale, Launcher(), "", "", ""), "--max-tokens"}
    ours.add("--max-sentences")  # another name of --batch-size
    for word in words:
        name = word.partition("=")[0]
        if word.startswith("--") and name in ours:
            raise UsageError(f"{where}: flags: {word}: is set by what the file says elsewhere")
        if name in NEEDED:
            raise UsageError(f"{where}: flags: {word}: the last checkpoint is evaluated")
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
            raise UsageError(f"{path}: {name} {getattr(scale, name)}: must be at most 1")
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


def row_cells(row: Row, scale: Scale, lr: float) -> list[Cell]:
    """The trainings of a row, one for each seed."""
    updates = max(1, round(row.length * scale.updates))
    batch_size = max(1, round(row.batch * scale.batch_size))
    flags = row_flags(row, scale)
    return [Cell(row.model, flags, seed, lr, updates, batch_size) for seed in row.seeds]


def row_flags(row: Row, scale: Scale) -> str:
    """A row's flags at a scale, spaced alike however they are written."""
    return shlex.join(shlex.split(row.flags.replace("{ffn}", str(scale.ffn_embed_dim))))


def sweep_cells(row: Row, scale: Scale) -> list[Cell]:
    """The trainings that choose a row's learning rate, the same for all rows of a model unless the
    row asks for a sweep with its own flags. Empty where there is nothing to choose."""
    if not row.seeds or row.lr is not None or len(scale.learning_rates) == 1:
        return []
    cell = Cell(
        row.model,
        row_flags(row, scale) if row.sweep else "",
        seed=1,
        lr=0.0,
        updates=max(1, round(scale.sweep_share * scale.updates)),
        batch_size=scale.batch_size,
    )
    return [replace(cell, lr=lr) for lr in scale.learning_rates]


def train_arguments(
    cell: Cell, scale: Scale, launcher: Launcher, data: str, save_dir: str, plugin: str
) -> list[str]:
    """The arguments of fairseq-train.

    Args:
        launcher: that starts it.
        data, save_dir: folders.
        plugin: what ``--user-dir`` is.

    Raises:
        UsageError: an update's sequences cannot be dealt to the processes.
    """
    shares = launcher.processes * launcher.update_freq
    if cell.batch_size % shares:
        raise UsageError(
            f"batch_size {cell.batch_size}: is not divided by {launcher.processes} processes times "
            f"update_freq {launcher.update_freq}"
        )
    interval = scale.save_interval or max(1, cell.updates // 4)
    warmup = max(1, round(scale.warmup_share * cell.updates))
    # A launcher that has a command tells its processes how many they are.
    processes = [] if launcher.command else ["--distributed-world-size", str(launcher.processes)]
    return [
        *(data, "--user-dir", plugin, "--task", "sffn_language_modeling"),
        *("--arch", scale.arch(cell.model)),
        *("--criterion", "sffn_cross_entropy"),
        *("--tokens-per-sample", str(scale.tokens_per_sample)),
        *("--batch-size", str(cell.batch_size // shares)),
        *("--update-freq", str(launcher.update_freq)),
        *("--lr", str(cell.lr), "--lr-scheduler", "polynomial_decay"),
        *("--warmup-updates", str(warmup), "--total-num-update", str(cell.updates)),
        *("--max-update", str(cell.updates), "--seed", str(cell.seed)),
        *("--save-dir", save_dir, "--no-epoch-checkpoints", "--keep-interval-updates", "1"),
        *("--save-interval-updates", str(interval)),
        *("--validate-interval-updates", str(interval)),
        *("--log-format", "json", "--log-interval", str(max(1, cell.updates // 50))),
        *processes,
        *shlex.split(scale.flags),
        *shlex.split(cell.flags),
    ]


def domains_of(scale: Scale) -> Iterator[Path]:
    """Folders of the sets out of domain, by name."""
    if scale.domains:
        yield from sorted(path for path in Path(scale.domains).iterdir() if path.is_dir())
