"""Results of trainings, and the logs that they are read from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_sffn.study.plan import Row, row_cells, sweep_cells
from fairseq_sffn.study.results import WHOLE, Results, curve, log_records, missing, write
from tests.study import made

ROW = Row("a", "avgk", "--sffn-block-size 16")


def line(kind: str, **values: object) -> str:
    prefix = "valid_" if kind == "valid" else ""
    record = {"epoch": 1, **{prefix + name: str(value) for name, value in values.items()}}
    return f"2026-01-01 | INFO | {kind} | {json.dumps(record)}"


def test_a_log_that_was_resumed(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    before = [
        line("train_inner", num_updates=10, loss=5, wps=100, wpb=50, load_max=3),
        "2026-01-01 | INFO | fairseq.trainer | {not a record}",
        line("valid", num_updates=10, loss=5.5, load_max=4),
        line("train_inner", num_updates=20, loss=4, wps=1, wpb=50),
        line("train_inner", num_updates=30, loss=3, wps=1, wpb=50),
        '2026-01-01 | INFO | train_inner | {"num_up',
        '2026-01-01 | INFO | train_inner | {"num_up2026-01-01 | INFO | fairseq | {"a": 1}',
    ]
    after = [
        "2026-01-01 | INFO | train_i"
        + line("train_inner", num_updates=20, loss=4.25, wps=25, wpb=50),
        line("train", num_updates=20, loss=99),
        line("train_inner", num_updates=30, loss="nan", wps=50, wpb=50),
        line("valid", num_updates=30, loss=3.5),
    ]
    log.write_text("\n".join([*before, *after]))
    assert [(kind, r["num_updates"]) for kind, r in log_records(log)] == [
        *(("train_inner", 10), ("valid", 10), ("train_inner", 20), ("train_inner", 30)),
        ("valid", 30),
    ]
    found = curve(log)
    assert [r["loss"] for r in found["train"][:2]] == [5, 4.25]  # the second time
    assert found["train"][2]["loss"] != found["train"][2]["loss"]
    assert found["train"][0] == {"update": 10, "loss": 5, "load_max": 3}
    assert found["valid"] == [
        {"update": 10, "loss": 5.5, "load_max": 4},
        {"update": 30, "loss": 3.5},
    ]
    # The update after a validation is left out: fairseq counts the time of both.
    assert found["tokens_per_second"] == pytest.approx(100 / (0.5 + 1), abs=0.1)


def test_the_learning_rate_with_the_lowest_validation_loss(tmp_path: Path) -> None:
    rates = (0.1, 0.2, 0.3, 0.4)
    results = made.empty(tmp_path, learning_rates=rates)
    assert results.learning_rate(ROW) is None
    losses = (None, 3.0, 2.5, float("nan"))
    for cell, loss in zip(sweep_cells(ROW, results.scale), losses, strict=True):
        assert results.learning_rate(ROW) is None  # not before the last
        results.add(cell, made.swept(loss))
    assert results.learning_rate(ROW) == 0.3
    assert results.learning_rate(replace(ROW, flags="--sffn-block-size 64")) == 0.3
    assert results.learning_rate(replace(ROW, sweep=True)) is None
    assert results.learning_rate(replace(ROW, lr=7.0)) == 7.0
    assert Results(results.folder, results.scale).learning_rate(ROW) == 0.3


def test_a_result_of_a_sweep_is_not_that_of_a_row(tmp_path: Path) -> None:
    """A row may ask for a training that the sweep has done, but not evaluated."""
    results = made.empty(tmp_path, sweep_share=1.0)
    row = replace(ROW, flags="")
    made.fill(results, [row], lambda row, cell: None)
    cells = row_cells(row, results.scale, 0.002)
    assert results.get(cells[0]) is not None
    assert missing(cells, results, WHOLE) == cells
    results.add(cells[0], made.result(50.0))
    assert missing(cells, results, WHOLE) == []
    assert results.learning_rate(row) == 0.002  # of 0.5 and 3.0 bits


def test_what_is_missing_is_there_once_and_by_seed(tmp_path: Path) -> None:
    results = made.empty(tmp_path)
    row = replace(ROW, seeds=(1, 2, 3))
    cells = row_cells(row, results.scale, 0.002)
    results.add(cells[1], made.result(50.0))
    assert missing([*cells[::-1], *cells], results) == [cells[0], cells[2]]
    assert missing(cells, results, "zero_shot") == cells
    results.add(cells[0], made.diverged())
    assert missing(cells, results, "zero_shot") == cells[1:]  # it diverged


def test_results_of_two_texts_are_refused(tmp_path: Path) -> None:
    results = made.empty(tmp_path)
    write(results.folder / "a.json", made.result(1.0) | {"data": "one"})
    write(results.folder / "b.json", made.result(1.0) | {"data": "two"})
    with pytest.raises(SystemExit, match="results of the text two, and this is one"):
        Results(results.folder, results.scale, "one")
    with pytest.raises(SystemExit, match="several texts: one, two"):
        Results(results.folder, results.scale)
    (results.folder / "c.json").write_text("{")
    with pytest.raises(SystemExit, match=r"c\.json: is no result"):
        Results(results.folder, results.scale, "one")


def changed(path: str, *value: object) -> str:
    """A result with something else, or nothing, in the place of what is at a path."""
    result = made.result(50.0, blocks=4)
    result["zero_shot"] = {"tasks": []}
    *names, last = path.split(".")
    inside = result
    for name in names:
        inside = inside[name]
    del inside[last]
    inside.update(zip([last], value, strict=False))
    return json.dumps(result)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"data": "abc", "routing": {}}', "machine: is missing"),
        ("[1]", "must be an object"),
        (changed("data", ["a"]), "data: must be a text"),
        (changed("evaluation"), "evaluation: is missing"),
        (changed("evaluation.valid.loss"), r"evaluation\.valid\.loss: is missing"),
        (
            changed("evaluation.valid.loss", "1"),
            r"evaluation\.valid\.loss: must be a number or null",
        ),
        (changed("evaluation.test"), r"evaluation\.test: is missing"),
        (changed("evaluation.law", {}), r"evaluation\.law\.perplexity: is missing"),
        (
            changed("evaluation.law", {"perplexity": None}),
            r"evaluation\.law\.perplexity: must be a number",
        ),
        (changed("machine", 2), "machine: must be a text"),
        (changed("versions.fairseq_sffn"), r"versions\.fairseq_sffn: is missing"),
        (changed("training.train", [{}]), r"training\.train\.update: is missing"),
        (changed("training.train", {}), r"training\.train: must be a list"),
        (changed("training.tokens_per_second"), r"training\.tokens_per_second: is missing"),
        (changed("routing", []), "routing: must be an object"),
        (changed("routing.3.counts"), r"routing\.3\.counts: is missing"),
        (changed("routing.3.blocks", [1]), r"routing\.3\.blocks: must be a list"),
        (changed("routing.3.counts", [1.5]), r"routing\.3\.counts: must be a whole number"),
        (changed("zero_shot", {}), r"zero_shot\.tasks: is missing"),
        (
            changed("zero_shot.tasks", [{"task": "piqa"}]),
            r"zero_shot\.tasks\.documents: is missing",
        ),
    ],
)
def test_a_file_that_is_no_result(text: str, error: str, tmp_path: Path) -> None:
    results = made.empty(tmp_path)
    results.folder.mkdir()
    (results.folder / "a.json").write_text(text)
    with pytest.raises(SystemExit, match=rf"a\.json: is no result: {error}$") as stopped:
        Results(results.folder, results.scale)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("result", [made.result(50.0, 4), made.diverged(), made.swept(None)])
def test_what_a_training_leaves_is_a_result(result: object, tmp_path: Path) -> None:
    results = made.empty(tmp_path)
    write(results.folder / "a.json", result)
    assert Results(results.folder, results.scale).by_key == {"a": result}
