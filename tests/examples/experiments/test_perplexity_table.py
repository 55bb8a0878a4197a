"""Tables of perplexity: settings, and the dense model at equal compute."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from experiments.files import Row, Table
from experiments.frame import Experiments
from experiments.plan import Run, Setting, final_runs, sweep_runs
from experiments.results import Results
from experiments.tables.perplexity import perplexities, sweep
from tests.examples.experiments import made

DENSE, AVGK = Row("dense", "dense"), Row("Avg-K", "avgk")
LOSSES = {Setting(0.002, 1.0): 3.0, Setting(0.002, 4.0): 2.0}
"""Validation losses of the best settings, base 2; the others have 4."""


def tables(results: Results, *rows: Row) -> tuple[Experiments, Table]:
    table = made.table(*rows)
    return Experiments(results.scale, results, {table.name: table}), table


def test_short_runs_and_finalists(tmp_path: Path) -> None:
    results = made.empty(tmp_path, init_scales=(1.0, 2.0, 4.0), finalists=2)
    for row in (DENSE, AVGK):
        for setting, run in sweep_runs(row, results.scale).items():
            gone = row is AVGK and setting == (0.001, 1.0)
            results.add(run, made.swept(None if gone else LOSSES.get(setting, 4.0)))
    best = [Setting(0.002, 4.0), Setting(0.002, 1.0)]
    finals = [*final_runs(DENSE, results.scale, best).values()]
    results.add(finals[0], made.result(9.0))
    experiments, table = tables(results, DENSE, AVGK)
    short, long = (part.markdown().splitlines() for part in sweep(experiments, table))
    names = [f"{lr}, scale {factor}" for lr in (0.001, 0.002) for factor in (1, 2, 4)]
    assert short[0] == f"| model | {' | '.join(names)} |"
    assert short[2:4] == [
        "| dense | 16.0 | 16.0 | 16.0 | 8.0 | 16.0 | **4.0** |",
        "| Avg-K | diverged | 16.0 | 16.0 | 8.0 | 16.0 | **4.0** |",
    ]
    assert "after 13 updates" in short[-1]
    assert short[-1].endswith("At an end of the tested initial scales: dense, Avg-K.")
    assert long[0] == "| model | 0.002, scale 1 | 0.002, scale 4 |"
    assert long[2:4] == ["| dense |  | 9.0 |", "| Avg-K |  |  |"]  # none is the best yet
    assert "after 40 updates" in long[-1] and "end" not in long[-1]

    results.add(finals[1], made.result(8.0))
    experiments, table = tables(results, DENSE, AVGK)
    long = sweep(experiments, table)[1].markdown().splitlines()
    assert long[2] == "| dense | **8.0** | 9.0 |"
    main = perplexities(experiments, table)[""][0].cells.set_index("model")
    assert main["initial scale"].to_dict() == {"dense": "1", "Avg-K": ""}
    assert main["learning rate"].to_dict() == {"dense": "0.002", "Avg-K": ""}
    assert main["test ppl"].to_dict() == {"dense": "8.0", "Avg-K": ""}


def test_until_they_are_known_the_first_settings_stand_for_finalists(tmp_path: Path) -> None:
    """So that the estimated time has the right number of runs."""
    results = made.empty(tmp_path, init_scales=(1.0, 2.0), finalists=2)
    experiments, _ = tables(results, DENSE, AVGK)
    assert experiments.frame.stage.value_counts().to_dict() == {"sweep": 8, "final": 4, "row": 2}
    (row,) = experiments.frame[experiments.frame.stage == "row"].drop_duplicates("run").label[:1]
    assert row == "dense"


def test_one_initial_scale_has_no_column(tmp_path: Path) -> None:
    results = made.empty(tmp_path)
    experiments, table = tables(results, DENSE)
    assert "initial scale" not in perplexities(experiments, table)[""][0].cells
    (short,) = sweep(experiments, table)
    assert [*short.cells] == ["model", "0.001", "0.002"]


def test_the_dense_model_at_equal_compute(tmp_path: Path) -> None:
    """The dense model has runs of four lengths. VanillaM takes more FLOPs, and PKM fewer."""
    curve = {0.5: 300.0, 1.0: 100.0, 2.0: 60.0, 4.0: 50.0}
    dense = [Row(f"dense, {n}", "dense", length=n, seeds=(1, 2)) for n in (1.0, 0.5, 2.0)]
    methods = [
        *(Row("Switch", "switch"), Row("VanillaM", "vanilla_m"), Row("PKM", "pkm")),
        *(Row("VanillaM, 2", "vanilla_m", length=2.0), Row("PKM, 0.5", "pkm", length=0.5)),
        Row("VanillaM, small batches", "vanilla_m", length=4.0, batch=0.25),
    ]
    longest = Row("dense, 4", "dense", length=4.0)
    other = Row("dense, other flags", "dense", "--dropout 0.5", length=3.0)
    results = made.empty(tmp_path)
    rows = [*dense, *methods, longest, other]

    def make(row: Row, run: Run) -> Any:
        test = curve.get(row.length, 7.0) + run.seed
        return made.result(test, valid=1000 / test)

    made.fill(results, rows, make)
    table, elsewhere = made.table(*dense, *methods), made.table(longest, other, name="elsewhere")
    found = {"t": table, "elsewhere": elsewhere}
    experiments = Experiments(results.scale, results, found)
    cells = perplexities(experiments, table)[""][0].cells.set_index("model")
    column = cells["dense, equal compute"].to_dict()

    flops = experiments.runs(table).drop_duplicates("label").set_index("label").flops
    unit = flops["dense, 1.0"]
    means = {0.5: 301.5, 1.0: 101.5, 2.0: 61.5, 4.0: 51.0}  # length 4 has one seed

    def between(label: str, shorter: float) -> float:
        """Interpolate on a line through two points, in the logarithms."""
        share = math.log(flops[label] / (shorter * unit)) / math.log(2)
        assert 0 < share < 1
        low, high = math.log(means[shorter]), math.log(means[2 * shorter])
        return math.exp(low + share * (high - low))

    expected = {"VanillaM": between("VanillaM", 2.0), "PKM": between("PKM", 0.5)}
    assert {label: float(cell) for label, cell in column.items() if cell} == {
        label: pytest.approx(value, abs=0.06) for label, value in expected.items()
    }
    assert set(column) - set(expected) >= {"VanillaM, 2", "PKM, 0.5"}  # outside of the curve


def test_no_column_without_a_dense_model_or_a_difference(tmp_path: Path) -> None:
    rows = [Row("dense", "dense"), Row("longer", "dense", length=2.0), Row("Switch", "switch")]
    other = [Row("dropout", "dense", "--dropout 0.1"), Row("VanillaM", "vanilla_m")]
    results = made.empty(tmp_path)
    made.fill(results, [*rows, *other], lambda row, run: made.result(9.0))
    for some in (rows, other, other[1:], [rows[0], other[1]]):
        experiments, table = tables(results, *some)
        assert "dense, equal compute" not in perplexities(experiments, table)[""][0].cells
