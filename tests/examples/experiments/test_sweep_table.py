"""The tables of the runs that choose learning rates and initial scales."""

from __future__ import annotations

from pathlib import Path

from experiments.files import Row, Table
from experiments.frame import Experiments
from experiments.plan import Setting, final_runs, sweep_runs
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
