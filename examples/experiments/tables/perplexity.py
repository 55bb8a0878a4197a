"""Tables of perplexity, and of what belongs to it: domains, learning rates, load, time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from fairseq_sffn.memory import usage

from ..files import Table
from ..outcomes import Experiments, Outcome
from ..plan import Run, sweep_runs
from ..summaries import Summary, summarize
from .part import (
    FLOPS_NOTE,
    Column,
    Part,
    Parts,
    entry,
    make,
    plain,
    runs_note,
    summary,
    text,
    versions_note,
    whole,
)

UNITS = {1e12: "10¹² FLOPs", 1e15: "10¹⁵ FLOPs", 1e18: "10¹⁸ FLOPs", 1e21: "10²¹ FLOPs"}


def flops_unit(largest: float) -> tuple[float, str]:
    """Return the unit in which the largest of some FLOPs is above 1, and the name of the axis."""
    unit = max((unit for unit in UNITS if unit <= largest), default=min(UNITS))
    return unit, f"training compute, {UNITS[unit]}"


def perplexity(experiments: Experiments, table: Table, *others: Column, note: str = "") -> Parts:
    """Make a table of perplexity in and out of domain, with other columns and a note."""
    outcomes = experiments.outcomes(table)
    unit, name = flops_unit(max(map(experiments.training_flops, outcomes)))

    def params(o: Outcome) -> int:
        return experiments.model(o.row).cost["params"]

    columns = [
        Column("model", text, lambda o: o.row.label),
        Column("parameters", lambda count: f"{count / 1e6:,.2f}M", params),
        Column(name, "{:#,.4g}".format, lambda o: experiments.training_flops(o) / unit),
        Column("learning rate", plain, lambda o: o.lr),
        Column("valid ppl", summary(1), lambda o: summarize(o.perplexity("valid").values())),
        Column("test ppl", summary(1), lambda o: summarize(o.perplexity("test").values())),
        Column("out-of-domain ppl", summary(1), lambda o: summarize(o.out_of_domain().values())),
        *others,
    ]
    machines = dict.fromkeys(r["machine"] for o in outcomes for r in o.good.values())
    trained = f"Trained on {' or '.join(machines)}." if machines else ""
    runs = runs_note(outcomes)
    names = dict.fromkeys(name for o in outcomes for name in o.domains)
    domains = [
        Column("set", text, lambda name: name),
        *(Column(o.row.label, summary(0), partial(of_set, o)) for o in outcomes),
    ]
    return {
        "": [make(columns, outcomes, runs, FLOPS_NOTE, trained, table.note, note)],
        "domains": [make(domains, names, runs)],
        "learning_rates": [learning_rates(experiments, table)],
    }


def of_set(outcome: Outcome, name: str) -> Summary | None:
    """Summarise the perplexity on a set."""
    return summarize(outcome.perplexity(name).values())


@dataclass(frozen=True)
class Swept:
    """The result of a learning rate.

    Attributes:
        perplexity: validation perplexity; ``None``: the run diverged.
        chosen: whether the learning rate is the best of its sweep.
    """

    perplexity: float | None
    chosen: bool

    def markdown(self) -> str:
        """Return the perplexity, in bold if the learning rate was chosen."""
        shown = "diverged" if self.perplexity is None else f"{self.perplexity:,.1f}"
        return f"**{shown}**" if self.chosen else shown


def learning_rates(experiments: Experiments, table: Table) -> Part:
    """Make a table of the short runs that choose each method's learning rate."""
    scale = experiments.scale
    rows, ends = {}, []
    for label, found in experiments.sweeps(table).items():
        finished = len(found) == len(scale.learning_rates)
        best = min(found, key=found.__getitem__) if finished else None
        rows[label] = {
            rate: Swept(ppl if ppl < math.inf else None, rate == best and ppl < math.inf)
            for rate, ppl in found.items()
        }
        if (
            best in (min(scale.learning_rates), max(scale.learning_rates))
            and found[best] < math.inf
        ):
            ends.append(text(label))
    updates = max(1, round(scale.sweep_share * scale.updates))
    columns = [
        Column("model", text, lambda row: row[0]),
        *(Column(plain(r), Swept.markdown, partial(entry, r)) for r in scale.learning_rates),
    ]
    swept = [experiments.results.get(run) for row in table.rows for run in sweep_runs(row, scale)]
    return make(
        columns,
        rows.items(),
        f"Validation perplexity after {updates} updates, one seed; bold: the chosen rate.",
        f"At an end of the tested range: {', '.join(ends)}." if ends else "",
        versions_note(filter(None, swept)),
    )


def balance(experiments: Experiments, table: Table) -> Parts:
    """Make a table of perplexity and of how evenly blocks are used on the validation split."""

    def load(measure: Callable[[torch.Tensor], float]) -> Callable[[Outcome], Summary | None]:
        def mean_of_layers(outcome: Outcome) -> Summary | None:
            layers = [
                [measure(torch.tensor(layer["counts"])) for layer in result["routing"].values()]
                for result in outcome.good.values()
            ]
            return summarize(statistics.fmean(values) for values in layers if values)

        return mean_of_layers

    return perplexity(
        experiments,
        table,
        Column("most loaded / mean", summary(2), load(usage.load_max)),
        Column("used blocks", summary(1, "%"), load(usage.memory_usage)),
        Column("entropy", summary(3), load(usage.load_entropy)),
        note="Load on the validation split at the end of training, mean of the sparse layers. "
        "Most loaded: load of the most loaded block over the mean load. Used blocks: share of "
        "blocks that some token uses. Entropy: entropy of the load over its maximum; an even load "
        "has 1.",
    )


def times(experiments: Experiments) -> Part:
    """Make a table of how many runs each table has and how long they took."""

    def hours(runs: Iterable[Run]) -> float:
        found = ((run, experiments.results.get(run)) for run in runs)
        speeds = ((run, r["training"]["tokens_per_second"] or 1e9) for run, r in found if r)
        return sum(run.tokens(experiments.scale) / speed for run, speed in speeds) / 3600

    by_table = {
        name: {
            *(run for o in experiments.outcomes(table) for run in o.runs),
            *(run for row in table.rows for run in sweep_runs(row, experiments.scale)),
        }
        for name, table in experiments.tables.items()
    }
    by_table = {name: runs for name, runs in by_table.items() if runs}
    columns = [
        Column("table", text, lambda item: item[0]),
        Column("runs", whole, lambda item: len(item[1])),
        Column("hours", "{:.1f}".format, lambda item: hours(item[1])),
    ]
    return make(
        columns,
        [*by_table.items(), ("all", set().union(*by_table.values()))],
        "Hours: training time of the finished runs, one after another, without evaluation. Each "
        "table counts the runs that it shares with others, and those that choose learning rates.",
    )
