"""Tables of perplexity, and of what belongs to it: domains, learning rates, load, time."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from ..files import REFERENCE, Table
from ..frame import FINAL, ROW, SWEEP, Experiments
from ..results import IN_DOMAIN
from ..trends import gaps, trends
from .part import (
    FLOPS_NOTE,
    Part,
    Parts,
    mean_sd,
    means,
    runs_note,
    short,
    shown,
    text,
    versions_note,
)
from .routing import layers_of

UNITS = {1e12: "10¹² FLOPs", 1e15: "10¹⁵ FLOPs", 1e18: "10¹⁸ FLOPs", 1e21: "10²¹ FLOPs"}


UNEQUAL = 0.03
"""Rows whose FLOPs differ by more are compared at equal compute, too."""


def flops_unit(largest: float) -> tuple[float, str]:
    """Return the unit in which the largest of some FLOPs is above 1, and the name of the axis."""
    unit = max((unit for unit in UNITS if unit <= largest), default=min(UNITS))
    return unit, f"training compute, {UNITS[unit]}"


def perplexities(
    experiments: Experiments,
    table: Table,
    more: Mapping[str, Iterable[str]] | None = None,
    note: str = "",
) -> Parts:
    """Make a table of perplexity in and out of domain, with more columns and a note."""
    runs = experiments.runs(table)
    rows = runs.drop_duplicates("label")
    unit, compute = flops_unit(rows.flops.max())
    size = experiments.scale.test_bytes_per_token
    scales = len(experiments.scale.init_scales) > 1
    bits = runs.assign(bits=np.log2(runs.test) / size) if size else None
    cells = {
        "model": rows.label.map(text),
        "parameters": [f"{model.cost['params'] / 1e6:,.2f}M" for model in rows.model],
        compute: shown(rows.flops / unit, "{:#,.4g}".format),
        "learning rate": shown(rows.lr, "{:g}".format),
        **({"initial scale": shown(rows.init_scale, "{:g}".format)} if scales else {}),
        "valid ppl": means(runs, "valid", 1),
        "test ppl": means(runs, "test", 1),
        **({} if bits is None else {"test bits/byte": means(bits, "bits", 3)}),
        **at_equal_compute(experiments, table, rows),
        "out-of-domain ppl": means(runs, "out_of_domain", 1),
        **(more or {}),
    }
    good = runs[runs.done & ~runs.diverged]
    machines = " or ".join(dict.fromkeys(result["machine"] for result in good.result))
    trained = f"Trained on {machines}." if machines else ""
    return {
        "": [Part(cells, [runs_note(runs), FLOPS_NOTE, trained, table.note, note])],
        "domains": [domains(runs)],
        "sweep": sweep(experiments, table),
        "trends": trend_lines(experiments, table),
    }


def at_equal_compute(
    experiments: Experiments, table: Table, rows: pd.DataFrame
) -> dict[str, list[str]]:
    """Make a column of the dense model's test perplexity at the training FLOPs of each row that
    takes more or fewer FLOPs per token than the dense model.

    It is interpolated between runs that differ from the table's dense row in length alone, linearly
    in the logarithms. There is no column where no row has a value.
    """
    of_dense = [row.label for row in table.rows if row.model == REFERENCE and not row.flags]
    dense = rows[rows.label.isin(of_dense)]
    if dense.empty:
        return {}
    first, frame = dense.iloc[0], experiments.frame
    kind = replace(first.run, updates=0, seed=0)
    frame = frame[(frame.stage == ROW) & frame.test.notna()].drop_duplicates("run")
    frame = frame[frame.run.map(lambda run: replace(run, updates=0, seed=0) == kind).astype(bool)]
    curve = np.log(frame.groupby("flops").test.mean())
    ratio = (rows.flops / rows.tokens) / (first.flops / first.tokens)
    same_batch = rows.run.map(lambda run: run.batch_size == first.run.batch_size)
    flops = rows.flops.where(same_batch & (abs(ratio - 1) > UNEQUAL))
    flops = flops.where(flops.between(curve.index.min(), curve.index.max()))
    if flops.isna().all():
        return {}
    values = np.exp(np.interp(np.log(flops), np.log(curve.index), curve))
    return {"dense, equal compute": shown(values, "{:.1f}".format)}


def domains(runs: pd.DataFrame) -> Part:
    """Make a table of the perplexity on each out-of-domain set: a line for each, a column for each
    row."""
    sets = dict.fromkeys(name for found in runs.perplexity for name in found)
    names = [name for name in sets if name not in IN_DOMAIN]
    cells = {"set": [text(name) for name in names]}
    for label, row in runs.groupby("label", sort=False):
        cells[label] = [mean_sd((one.get(name) for one in row.perplexity), 0) for name in names]
    return Part(cells, [runs_note(runs)], left=["set"])


def trend_lines(experiments: Experiments, table: Table) -> list[Part]:
    """Make a table of how the gaps of a figure change; see :class:`Trend`."""
    fits = trends(experiments, table)
    if not fits:
        return []
    last = gaps(experiments.runs(table))["where"].max()
    cells = {
        "model": [text(fit.group) for fit in fits],
        f"gap at {short(last)}": [interval(*fit.at(last)) for fit in fits],
        "change per doubling": [interval(*fit.change()) for fit in fits],
        f"extrapolated to {short(2 * last)}": [interval(*fit.at(2 * last)) for fit in fits],
    }
    note = (
        f"Test perplexity against the dense model: lines through the logarithms of the ratios, "
        f"from {short(table.trend_from or 0)} on, with 95% intervals. Their width comes from the "
        f"deviation of seeds, and from how far the points are from the line where that is more."
    )
    return [Part(cells, [note])]


def interval(middle: float, low: float, high: float) -> str:
    """Format a difference of log perplexity and its interval, in percent of perplexity."""
    middle, low, high = (100 * math.expm1(value) for value in (middle, low, high))
    return f"{middle:+z.1f}% ({low:+z.1f}% to {high:+z.1f}%)"


def sweep(experiments: Experiments, table: Table) -> list[Part]:
    """Make tables of the runs that choose the settings of methods: short ones, and finalists."""
    scale, runs = experiments.scale, experiments.runs(table, SWEEP)
    updates = max(1, round(scale.sweep_share * scale.updates))
    notes = [f"At an end of the tested {name}: {labels}." for name, labels in at_ends(runs).items()]
    several = len(scale.init_scales) > 1
    parts = [settings(runs, several, updates, notes)]
    if scale.finalists > 1:
        parts.append(settings(experiments.runs(table, FINAL), several, scale.updates, []))
    return parts


def settings(runs: pd.DataFrame, several: bool, updates: int, notes: list[str]) -> Part:
    """Make a table of validation perplexity: a line for each sweep, a column for each setting, of
    one or several initial scales."""
    labels = runs.label.unique()
    runs = runs.sort_values(["lr", "init_scale"], kind="stable").assign(
        setting=lambda frame: [
            f"{lr:g}, scale {scale:g}" if several else f"{lr:g}"
            for lr, scale in zip(frame.lr, frame.init_scale, strict=True)
        ]
    )
    lines = []
    for label in labels:
        tried = runs[runs.label == label]
        known = tried.done.all() and tried.valid.notna().any()
        line = dict.fromkeys(["model", *runs.setting], "") | {"model": text(label)}
        for run in tried.itertuples():
            found = "diverged" if run.diverged else mean_sd([run.valid], 1)
            best = known and run.Index == tried.valid.idxmin()
            line[run.setting] = f"**{found}**" if best else found
        lines.append(line)
    note = f"Validation perplexity after {updates} updates, one seed; bold: the best."
    return Part(pd.DataFrame(lines), [note, *notes, versions_note(runs)])


def at_ends(runs: pd.DataFrame) -> dict[str, str]:
    """Return the sweeps whose best setting is at an end of what was tested, by what is at its end.
    Of two values, each is at an end."""
    names = {"learning rates": "lr", "initial scales": "init_scale"}
    ends: dict[str, str] = {}
    for name, column in names.items():
        found = [
            text(label)
            for label, tried in runs.groupby("label", sort=False)
            if tried.done.all()
            and tried.valid.notna().any()
            and tried[column].nunique() > 2
            and tried[column][tried.valid.idxmin()] in (tried[column].min(), tried[column].max())
        ]
        ends |= {name: ", ".join(found)} if found else {}
    return ends


def balance(experiments: Experiments, table: Table) -> Parts:
    """Make a table of perplexity and of how evenly blocks are used on the validation split."""
    runs = experiments.runs(table)
    loads = layers_of(runs).groupby(["label", "seed"])[["load_max", "used", "entropy"]].mean()
    runs = runs.join(loads, on=["label", "seed"])
    more = {
        "most loaded / mean": means(runs, "load_max"),
        "used blocks": means(runs, "used", 1, "%"),
        "entropy": means(runs, "entropy", 3),
    }
    note = (
        "Load on the validation split at the end of training, mean of the sparse layers. "
        "Most loaded: load of the most loaded block over the mean load. Used blocks: share of "
        "blocks that some token uses. Entropy: entropy of the load over its maximum; an even load "
        "has 1."
    )
    return perplexities(experiments, table, more, note)


def times(experiments: Experiments) -> Part:
    """Make a table of how many runs each table has and how long they took."""
    frame = experiments.frame.sort_values("done", ascending=False, kind="stable")
    trained = ({"tokens_per_second": 0} | result.get("training", {}) for result in frame.result)
    speeds = [training["tokens_per_second"] or None for training in trained]
    frame = frame.assign(hours=frame.tokens / pd.Series(speeds, frame.index, float) / 3600)
    tables = dict([*frame.drop_duplicates(["table", "run"]).groupby("table")])
    tables["all"] = frame.drop_duplicates("run")
    cells = {
        "table": map(text, tables),
        "runs": [f"{len(runs):,}" for runs in tables.values()],
        "hours": [f"{runs.hours.sum():.1f}" for runs in tables.values()],
    }
    note = (
        "Hours: training time of the finished runs, one after another, without evaluation. Each "
        "table counts the runs that it shares with others, and those that choose learning rates."
    )
    return Part(cells, [note], left=["table"])
