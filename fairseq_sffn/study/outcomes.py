"""What the results say of each row of a study's tables."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..memory import MemoryConfig
from ..tools.cost import cost_by_part, cost_figures, training_flops_per_token
from ..tools.language_model import build_language_model
from .plan import Cell, Row, Scale, Table, row_cells, row_flags, sweep_cells
from .results import WHOLE, Results, valid_loss

OF_DOMAIN = ("valid", "test")
"""The sets of an evaluation that are of the training's text."""


class Model(NamedTuple):
    """A model as built.

    Attributes:
        cost: see :func:`cost_figures`.
        training_flops: see :func:`training_flops_per_token`.
        memory: of its sparse layers; ``None``: it has none.
    """

    cost: dict[str, Any]
    training_flops: int
    memory: MemoryConfig | None


def build_model(model: str, flags: str, scale: Scale) -> Model:
    """Builds a model at a scale, if possible without memory for it.

    Raises:
        UsageError: it cannot be built.
    """
    arch, context = f"transformer_lm_{model}_{scale.size}", scale.tokens_per_sample
    words = [*shlex.split(scale.flags), *shlex.split(flags)]
    built = build_language_model(arch, scale.dictionary, context, words, strict=False)
    flops = training_flops_per_token(cost_by_part(built, context))
    return Model(cost_figures(built, context, None), flops, getattr(built, "memory_config", None))


@dataclass(frozen=True)
class Outcome:
    """What came out of a row's trainings.

    Attributes:
        row: of the table.
        lr: its learning rate; ``None``: not chosen yet.
        cells: its trainings.
        results: seed -> result, of those that are done.
    """

    row: Row
    lr: float | None
    cells: tuple[Cell, ...]
    results: Mapping[int, dict[str, Any]]

    @property
    def diverged(self) -> list[int]:
        """Seeds of trainings that ended in numbers that are none."""
        return [seed for seed, result in self.results.items() if math.isinf(valid_loss(result))]

    @property
    def good(self) -> dict[int, dict[str, Any]]:
        """Seed -> result, of those that did not diverge."""
        return {seed: r for seed, r in self.results.items() if seed not in self.diverged}

    @property
    def domains(self) -> list[str]:
        """Names of the sets out of domain."""
        sets = dict.fromkeys(name for r in self.good.values() for name in r["evaluation"])
        return [name for name in sets if name not in OF_DOMAIN]

    def perplexity(self, name: str) -> dict[int, float]:
        """Seed -> perplexity on a set. Empty where a training diverged: the mean of the others
        would flatter the row."""
        if self.diverged:
            return {}
        return {s: r["evaluation"][name]["perplexity"] for s, r in self.good.items()}

    def out_of_domain(self) -> dict[int, float]:
        """Seed -> mean of the perplexities out of domain."""
        if not self.domains:
            return {}
        sets = [self.perplexity(name) for name in self.domains]
        return {s: sum(found[s] for found in sets) / len(sets) for s in sets[0]}


def outcome(row: Row, results: Results, part: str = WHOLE) -> Outcome:
    """The outcome of a row; a result without that part is not done."""
    lr = results.learning_rate(row)
    cells = tuple(row_cells(row, results.scale, lr or 0.0))
    found = {cell.seed: results.get(cell) for cell in cells if lr is not None}
    done = {s: r for s, r in found.items() if r is not None and _done(r, part)}
    return Outcome(row, lr, cells, done)


def _done(result: dict[str, Any], part: str) -> bool:
    """Whether there is nothing more to come."""
    return part in result or (WHOLE in result and math.isinf(valid_loss(result)))


@dataclass
class Study:
    """Tables, and the results that they are rendered from.

    Args:
        scale: of the results.
        results: of trainings.
        tables: by name.
    """

    scale: Scale
    results: Results
    tables: dict[str, Table]
    models: dict[tuple[str, str, str], Model] = field(default_factory=dict)

    def outcomes(self, table: Table) -> list[Outcome]:
        """Of a table's rows."""
        part = "zero_shot" if table.zero_shot else WHOLE
        return [outcome(row, self.results, part) for row in table.rows]

    def sweeps(self, table: Table) -> dict[str, dict[float, float]]:
        """Of the trainings that chose learning rates: label of the first row that shares them ->
        learning rate -> perplexity on validation, infinite where it diverged."""
        found: dict[tuple[Cell, ...], str] = {}
        for row in table.rows:
            found.setdefault(tuple(sweep_cells(row, self.scale)), row.label)
        return {
            label: {
                cell.lr: 2 ** valid_loss(result)
                for cell in cells
                if (result := self.results.get(cell))
            }
            for cells, label in found.items()
            if cells
        }

    def model(self, row: Row, scale: Scale | None = None) -> Model:
        """The model of a row, at another scale if told so; built once."""
        scale = scale or self.scale
        key = row.model, row_flags(row, scale), scale.size
        if key not in self.models:
            self.models[key] = build_model(*key[:2], scale)
        return self.models[key]

    def training_flops(self, outcome: Outcome) -> float:
        """Of each training of a row."""
        return self.model(outcome.row).training_flops * outcome.cells[0].tokens(self.scale)


def count_missing(outcomes: Iterable[Outcome]) -> tuple[int, int]:
    """Trainings that are not done, and all, each counted once."""
    outcomes = list(outcomes)
    cells = {cell: cell.seed in o.results for o in outcomes for cell in o.cells}
    return sum(not done for done in cells.values()), len(cells)
