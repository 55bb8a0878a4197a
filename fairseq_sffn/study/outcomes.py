"""What the results say of each row of a study's tables."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..memory import MemoryConfig
from ..tools.cost import cost_by_part, cost_figures, training_flops_per_token
from ..tools.language_model import build_language_model
from .plan import REFERENCE, Cell, Row, Scale, Table, row_cells, row_flags, sweep_cells
from .results import IN_DOMAIN, WHOLE, Results, is_done, valid_loss
from .statistics import Summary, summarize


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
    context = scale.tokens_per_sample
    words = [*shlex.split(scale.flags), *shlex.split(flags), *ONE_PROCESS]
    built = build_language_model(scale.arch(model), scale.dictionary, context, words, strict=False)
    flops = training_flops_per_token(cost_by_part(built, context))
    return Model(cost_figures(built, context, None), flops, getattr(built, "memory_config", None))


ONE_PROCESS = ("--sffn-expert-parallel", "1")
"""Of a model that is only built, wherever it is trained."""


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
        return [name for name in sets if name not in IN_DOMAIN]

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose routing is known."""
        return list(dict.fromkeys(name for r in self.good.values() for name in r["routing"]))

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
    done = {s: r for s, r in found.items() if r is not None and is_done(r, part)}
    return Outcome(row, lr, cells, done)


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
        """Of the trainings that chose learning rates: label -> learning rate -> perplexity on
        validation, infinite where it diverged. The label is that of a row that has its own, or is
        the model with its defaults; elsewhere the model."""
        defaults = {r.model: r.label for r in reversed(table.rows) if not r.flags}
        found: dict[tuple[Cell, ...], str] = {}
        for row in table.rows:
            name = row.label if row.sweep else defaults.get(row.model, row.model)
            found.setdefault(tuple(sweep_cells(row, self.scale)), name)
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

    def tokens(self, row: Row) -> int:
        """That each training of a row is of, or would be where there is none."""
        return row_cells(replace(row, seeds=(1,)), self.scale, 0.0)[0].tokens(self.scale)

    def training_flops(self, outcome: Outcome) -> float:
        """Of each training of a row."""
        return self.model(outcome.row).training_flops * self.tokens(outcome.row)


def all_results(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Of all trainings that are done."""
    return [result for o in outcomes for result in o.results.values()]


def count_missing(outcomes: Iterable[Outcome]) -> tuple[int, int]:
    """Trainings that are not done, and all, each counted once."""
    outcomes = list(outcomes)
    cells = {cell: cell.seed in o.results for o in outcomes for cell in o.cells}
    return sum(not done for done in cells.values()), len(cells)


# What figures show


Points = dict[str, list[tuple[float, Summary]]]
"""Group -> where its rows stand on the axis, and what was found there."""


def row_x(row: Row, scale: Scale) -> float | None:
    """Where a row stands on the axis; ``None``: nowhere."""
    value = str(row.x).replace("{ffn}", str(scale.ffn_embed_dim))
    return float(value) if value else None


def groups(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Group -> its rows."""
    found: dict[str, list[Outcome]] = {}
    for o in outcomes:
        if o.row.group:
            found.setdefault(o.row.group, []).append(o)
    return found


def line_points(study: Study, table: Table) -> Points:
    """Perplexity on test against ``x``, of the groups that have any."""
    found: Points = {}
    for name, rows in groups(study.outcomes(table)).items():
        for o in rows:
            x, ppl = row_x(o.row, study.scale), summarize(o.perplexity("test").values())
            if x is not None and ppl is not None:
                found.setdefault(name, []).append((x, ppl))
    return found


def gap_points(study: Study, table: Table) -> Points:
    """How much higher each group's test perplexity is than the reference's at the same ``x``, or at
    the same training tokens where a row has none; of the groups that have any."""
    by_group = groups(study.outcomes(table))

    def where(o: Outcome) -> float:
        x = row_x(o.row, study.scale)
        return float(study.tokens(o.row)) if x is None else x

    reference = {where(o): o.perplexity("test") for o in by_group.pop(REFERENCE, [])}
    found: Points = {}
    for name, rows in by_group.items():
        for o in rows:
            base, own = reference.get(where(o), {}), o.perplexity("test")
            if ratio := summarize(own[seed] / base[seed] - 1 for seed in own if seed in base):
                found.setdefault(name, []).append((where(o), ratio))
    return found


def flops_points(study: Study, table: Table) -> list[tuple[str, float, Summary]]:
    """Label, FLOPs of training and perplexity on test."""
    found = [(o, summarize(o.perplexity("test").values())) for o in study.outcomes(table)]
    return [(o.row.label, study.training_flops(o), ppl) for o, ppl in found if ppl is not None]


def tested(study: Study, table: Table) -> list[Outcome]:
    """Rows whose perplexity on test is known."""
    return [o for o in study.outcomes(table) if o.perplexity("test")]


def routed(study: Study, table: Table) -> list[Outcome]:
    """Rows that have layers whose routing is known."""
    return [o for o in study.outcomes(table) if o.layers]


SHOWN: dict[str, Callable[[Study, Table], Sized]] = {
    "lines": line_points,
    "flops": flops_points,
    "load": routed,
    "gap": gap_points,
    "routing": routed,
    "bars": tested,
}
"""Kind of a figure -> what it shows; empty: there is nothing to draw."""
