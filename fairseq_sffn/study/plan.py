"""What a study is made of, and the trainings that it asks for."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError

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
        """Everything that decides what comes out, but for the text, the code, and how the sequences
        of an update are dealt to processes and batches."""
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
