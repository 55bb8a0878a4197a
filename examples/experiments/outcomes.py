"""The results of each row of the tables."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fairseq_sffn.memory import MemoryConfig
from fairseq_sffn.tools.cost import cost_by_part, cost_figures, training_flops_per_token
from fairseq_sffn.tools.language_model import build_language_model

from .files import Row, Scale, Table
from .plan import Run, row_flags, row_runs, sweep_runs
from .results import EVALUATED, IN_DOMAIN, Results, is_done, valid_loss

ONE_PROCESS = ("--sffn-expert-parallel", "1")
"""Flags that build the whole model in this process, even if training shards it."""


class Model(NamedTuple):
    """Properties of a model that are known without training it.

    Attributes:
        cost: see :func:`cost_figures`.
        training_flops: see :func:`training_flops_per_token`.
        memories: name of each sparse layer, as in results -> its configuration.
    """

    cost: dict[str, Any]
    training_flops: int
    memories: Mapping[str, MemoryConfig]


def build_model(model: str, flags: str, scale: Scale) -> Model:
    """Build a model at a scale, if possible without memory for its parameters."""
    context = scale.tokens_per_sample
    words = [*shlex.split(scale.flags), *shlex.split(flags), *ONE_PROCESS]
    built = build_language_model(scale.arch(model), scale.dictionary, context, words, strict=False)
    flops = training_flops_per_token(cost_by_part(built, context))
    configs = getattr(built, "memory_configs", {})
    memories = {name.removeprefix("layer"): config for name, config in configs.items()}
    return Model(cost_figures(built, context, None), flops, memories)


@dataclass(frozen=True)
class Outcome:
    """The results of a row.

    Attributes:
        row: the row.
        lr: its learning rate; ``None``: not chosen yet.
        runs: its runs.
        results: seed -> result of the finished runs.
    """

    row: Row
    lr: float | None
    runs: tuple[Run, ...]
    results: Mapping[int, dict[str, Any]]

    @property
    def diverged(self) -> list[int]:
        """Seeds of the runs that diverged."""
        return [seed for seed, result in self.results.items() if math.isinf(valid_loss(result))]

    @property
    def good(self) -> dict[int, dict[str, Any]]:
        """Seed -> result of the runs that did not diverge."""
        return {seed: r for seed, r in self.results.items() if seed not in self.diverged}

    @property
    def first(self) -> dict[str, Any]:
        """Result of the first seed."""
        return self.good[min(self.good)]

    @property
    def domains(self) -> list[str]:
        """Names of the out-of-domain sets."""
        sets = dict.fromkeys(name for r in self.good.values() for name in r["evaluation"])
        return [name for name in sets if name not in IN_DOMAIN]

    @property
    def layers(self) -> list[str]:
        """Names of the sparse layers."""
        return list(dict.fromkeys(name for r in self.good.values() for name in r["routing"]))

    def perplexity(self, name: str) -> dict[int, float]:
        """Return seed -> perplexity on a set. Empty where a run diverged, as the mean of the other
        runs would flatter the row."""
        if self.diverged:
            return {}
        return {seed: r["evaluation"][name]["perplexity"] for seed, r in self.good.items()}

    def out_of_domain(self) -> dict[int, float]:
        """Return seed -> mean perplexity of the out-of-domain sets."""
        sets = [self.perplexity(name) for name in self.domains]
        return {s: sum(found[s] for found in sets) / len(sets) for s in sets[0]} if sets else {}


@dataclass
class Experiments:
    """Tables and results.

    Args:
        scale: scale of the results.
        results: results of runs.
        tables: name -> table.
    """

    scale: Scale
    results: Results
    tables: dict[str, Table]
    models: dict[tuple[str, str, str], Model] = field(default_factory=dict)

    def outcomes(self, table: Table) -> list[Outcome]:
        """Return the outcomes of a table's rows; results without what it shows are left out."""
        section = "zero_shot" if table.zero_shot else EVALUATED
        found = []
        for row in table.rows:
            lr = self.results.learning_rate(row)
            runs = tuple(row_runs(row, self.scale, lr or 0.0))
            results = {run.seed: self.results.get(run) or {} for run in runs if lr is not None}
            done = {seed: r for seed, r in results.items() if is_done(r, section)}
            found.append(Outcome(row, lr, runs, done))
        return found

    def sweeps(self, table: Table) -> dict[str, dict[float, float]]:
        """Return the sweeps that chose learning rates.

        Returns:
            Label -> learning rate -> validation perplexity, infinite where the run diverged. The
            label is the row's if it has its own sweep or all defaults; otherwise it is the model.
        """
        defaults = {r.model: r.label for r in reversed(table.rows) if not r.flags}
        labels: dict[tuple[Run, ...], str] = {}
        for row in table.rows:
            name = row.label if row.sweep else defaults.get(row.model, row.model)
            labels.setdefault(tuple(sweep_runs(row, self.scale)), name)
        return {
            label: {
                run.lr: 2 ** valid_loss(result) for run in runs if (result := self.results.get(run))
            }
            for runs, label in labels.items()
            if runs
        }

    def model(self, row: Row, scale: Scale | None = None) -> Model:
        """Return the model of a row, at another scale if one is given."""
        scale = scale or self.scale
        key = row.model, row_flags(row, scale), scale.size
        if key not in self.models:
            self.models[key] = build_model(*key[:2], scale)
        return self.models[key]

    def memories(self, outcome: Outcome) -> Mapping[str, MemoryConfig]:
        """Return the configuration of each sparse layer of a row."""
        return self.model(outcome.row).memories

    def tokens(self, row: Row) -> int:
        """Return the training tokens of each run of a row."""
        return row_runs(replace(row, seeds=(1,)), self.scale, 0.0)[0].tokens(self.scale)

    def training_flops(self, outcome: Outcome) -> float:
        """Return the training FLOPs of each run of a row."""
        return self.model(outcome.row).training_flops * self.tokens(outcome.row)


def count_missing(outcomes: Iterable[Outcome]) -> tuple[int, int]:
    """Count the missing runs and all runs of some rows, each once."""
    done = {run: run.seed in o.results for o in outcomes for run in o.runs}
    return sum(not one for one in done.values()), len(done)
