"""The training runs that tables ask for, and their commands."""

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fairseq_sffn.errors import UsageError

from .files import REFERENCE, Launcher, Row, Scale

INIT_SCALE = "--sffn-init-scale"


class Setting(NamedTuple):
    """What a sweep chooses for a method: the learning rate, and the factor of the initial FFNs in
    those layers that are sparse in sparse models."""

    lr: float
    init_scale: float = 1.0


@dataclass(frozen=True)
class Run:
    """A training run; see :class:`Row`."""

    model: str
    flags: str
    seed: int
    lr: float
    updates: int
    batch_size: int  # sequences per update

    def settings(self, scale: Scale) -> dict[str, Any]:
        """Return all that determines the result, except for the text, the code, and how the
        sequences of an update are divided into processes and batches."""
        shared = ("size", "tokens_per_sample", "warmup_share", "flags")
        return asdict(self) | {f"scale_{name}": getattr(scale, name) for name in shared}

    def key(self, scale: Scale) -> str:
        """Return the name of the run's files: the model and a hash of the settings."""
        canonical = json.dumps(self.settings(scale), sort_keys=True)
        return f"{self.model}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}"

    def tokens(self, scale: Scale) -> int:
        """Return the number of training tokens."""
        return self.updates * self.batch_size * scale.tokens_per_sample

    def expected_seconds(self, scale: Scale) -> float:
        """Estimate the seconds of the run, on one core or on the hardware that the scale
        assumes."""
        relative = scale.relative_time.get(self.model, 1.0)
        return self.tokens(scale) * relative / scale.tokens_per_second


def row_runs(row: Row, scale: Scale, setting: Setting) -> list[Run]:
    """Return the runs of a row with a setting, one for each seed.

    Raises:
        UsageError: the row's flags have an initial scale, which the sweep chooses.
    """
    updates = max(1, round(row.length * scale.updates))
    batch_size = max(1, round(row.batch * scale.batch_size))
    model, flags = row.model, row_flags(row, scale)
    if len(scale.init_scales) > 1 and INIT_SCALE in flags:
        reason = "is chosen by the sweep; the key init_scale fixes it"
        raise UsageError(f"row {row.label!r}: flags: {INIT_SCALE}: {reason}")
    if setting.init_scale != 1:
        flags = f"{flags} {INIT_SCALE} {setting.init_scale:g}".strip()
        if model == REFERENCE:  # HashLayer with one block is the dense model
            model, flags = "hash_layer", f"--sffn-expansion 1 {flags}"
    return [Run(model, flags, seed, setting.lr, updates, batch_size) for seed in row.seeds]


def row_flags(row: Row, scale: Scale) -> str:
    """Return a row's flags at a scale, with normalised spaces and quotes. ``{ffn}`` stands for the
    FFN width, and ``{ffn/16}`` for a 16th of it.

    Raises:
        UsageError: such a share is no whole number.
    """

    def width(found: re.Match[str]) -> str:
        share, rest = divmod(scale.ffn_embed_dim, int(found[1] or 1))
        if rest:
            raise UsageError(f"row {row.label!r}: flags: {found[0]}: does not divide the FFN width")
        return str(share)

    flags = re.sub(r"\{ffn(?:/([1-9]\d*))?\}", width, row.flags)
    return shlex.join(shlex.split(flags))


def sweep_runs(row: Row, scale: Scale) -> dict[Setting, Run]:
    """Return the short runs of the sweep that chooses a row's setting. They are the same for all
    rows of a model, unless the row sweeps with its own flags. There are none where there is nothing
    to choose."""
    settings = [
        *itertools.starmap(Setting, itertools.product(scale.learning_rates, scale.init_scales))
    ]
    open_lr = row.lr is None and len(scale.learning_rates) > 1
    open_scale = row.init_scale is None and len(scale.init_scales) > 1
    choose = row.seeds and (open_lr or open_scale)
    return _runs_of_settings(row, scale, settings, scale.sweep_share) if choose else {}


def final_runs(row: Row, scale: Scale, finalists: Iterable[Setting]) -> dict[Setting, Run]:
    """Return the runs of length 1 that choose one of the best settings of a row's sweep."""
    return _runs_of_settings(row, scale, finalists, 1.0)


def _runs_of_settings(
    row: Row, scale: Scale, settings: Iterable[Setting], length: float
) -> dict[Setting, Run]:
    one = Row(row.label, row.model, row.flags if row.sweep else "", length=length)
    return {setting: row_runs(one, scale, setting)[0] for setting in settings}


def train_arguments(
    run: Run, scale: Scale, launcher: Launcher, data: str, save_dir: str, plugin: str
) -> list[str]:
    """Return the arguments of fairseq-train, for the binarised text in a folder. ``plugin`` is the
    value of ``--user-dir``.

    Raises:
        UsageError: the sequences of an update cannot be divided evenly.
    """
    shares = launcher.processes * launcher.update_freq
    if run.batch_size % shares:
        raise UsageError(
            f"batch_size {run.batch_size}: is not divided by {launcher.processes} processes times "
            f"update_freq {launcher.update_freq}"
        )
    interval = scale.save_interval or max(1, run.updates // 4)
    values = {
        "user-dir": plugin,
        "task": "sffn_language_modeling",
        "arch": scale.arch(run.model),
        "criterion": "sffn_cross_entropy",
        "tokens-per-sample": scale.tokens_per_sample,
        "batch-size": run.batch_size // shares,
        "update-freq": launcher.update_freq,
        "lr": run.lr,
        "lr-scheduler": "polynomial_decay",
        "warmup-updates": max(1, round(scale.warmup_share * run.updates)),
        "total-num-update": run.updates,
        "max-update": run.updates,
        "seed": run.seed,
        "save-dir": save_dir,
        "keep-interval-updates": 1,
        "save-interval-updates": interval,
        "validate-interval-updates": interval,
        "log-format": "json",
        "log-interval": max(1, run.updates // 50),
    }
    if not launcher.command:  # a command tells the processes how many they are
        values["distributed-world-size"] = launcher.processes
    words = [data, "--no-epoch-checkpoints"]
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    return [*words, *shlex.split(scale.flags), *shlex.split(run.flags)]


def domains_of(scale: Scale) -> Iterator[Path]:
    """Yield the folders of the out-of-domain sets, ordered by name."""
    if scale.domains:
        yield from sorted(path for path in Path(scale.domains).iterdir() if path.is_dir())
