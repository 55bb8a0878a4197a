"""Results of runs, and the logs from which they are read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.files import Row
from experiments.plan import Setting, final_runs, row_runs, sweep_runs
from experiments.results import EVALUATED, Results, curve, is_done, write
from fairseq_sffn.tools.training_log import log_records
from tests.examples.experiments import made

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
    # The update after a validation is left out, as fairseq counts the time of both.
    assert found["tokens_per_second"] == pytest.approx(100 / (0.5 + 1), abs=0.1)


def test_the_learning_rate_with_the_lowest_validation_loss(tmp_path: Path) -> None:
    rates = (0.1, 0.2, 0.3, 0.4)
    results = made.empty(tmp_path, learning_rates=rates)
    assert results.setting(ROW) is None
    losses = (None, 3.0, 2.5, float("nan"))
    for run, loss in zip(sweep_runs(ROW, results.scale).values(), losses, strict=True):
        assert results.setting(ROW) is None  # not before the last run
        results.add(run, made.swept(loss))
    assert results.setting(ROW) == (0.3, 1.0)
    assert results.setting(replace(ROW, flags="--sffn-block-size 64")) == (0.3, 1.0)
    assert results.setting(replace(ROW, sweep=True)) is None
    assert results.setting(replace(ROW, lr=7.0)) == (7.0, 1.0)
    assert Results(results.folder, results.scale).setting(ROW) == (0.3, 1.0)


def test_the_best_finalist_is_chosen(tmp_path: Path) -> None:
    results = made.empty(tmp_path, init_scales=(1.0, 2.0), finalists=2)
    losses = dict(zip(sweep_runs(ROW, results.scale), (3.0, None, 2.6, 2.5), strict=True))
    for setting, run in sweep_runs(ROW, results.scale).items():
        assert results.finalists(ROW) == []
        results.add(run, made.swept(losses[setting]))
    best = [Setting(0.002, 2.0), Setting(0.002, 1.0)]
    assert results.finalists(ROW) == best
    assert results.setting(replace(ROW, lr=7.0, init_scale=3.0)) == (7.0, 3.0)
    # The best short run with what a row fixes; or of all.
    assert results.setting(replace(ROW, lr=0.001)) == (0.001, 1.0)
    assert results.setting(replace(ROW, init_scale=1.0)) == (0.002, 1.0)
    assert results.setting(replace(ROW, lr=7.0)) == (7.0, 2.0)
    for setting, run in final_runs(ROW, results.scale, best).items():
        assert results.setting(ROW) is None
        results.add(run, made.result(50.0) if setting.init_scale == 1 else made.result(51.0))
    assert results.setting(ROW) == best[1]
    assert results.setting(replace(ROW, lr=7.0)) == (7.0, 2.0)
    assert results.setting(replace(ROW, init_scale=3.0)) == (0.002, 3.0)
    for run in final_runs(ROW, results.scale, best).values():
        results.add(run, made.diverged())
    assert results.setting(ROW) is None


def test_a_result_of_a_sweep_is_not_that_of_a_row(tmp_path: Path) -> None:
    """A row may ask for a run that the sweep has trained but not evaluated."""
    results = made.empty(tmp_path, sweep_share=1.0)
    row = replace(ROW, flags="")
    made.fill(results, [row], lambda row, run: None)
    runs = row_runs(row, results.scale, Setting(0.002))
    found = results.get(runs[0])
    assert found is not None and is_done(found, "evaluation") and not is_done(found, EVALUATED)
    found = made.result(50.0)
    results.add(runs[0], found)
    assert is_done(found, EVALUATED)
    assert results.setting(row) == (0.002, 1.0)  # with 0.5 bits, not 3.0


def test_what_diverged_is_done() -> None:
    assert not is_done({}, "evaluation") and not is_done(made.result(50.0), "zero_shot")
    assert is_done(made.diverged(), "zero_shot")


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
    """Return a result in which the value at a path is replaced or removed."""
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
        ('{"data": "abc", "routing": {}}', "machine: Field required"),
        ("[1]", r" \[1\]: Input should be an object"),
        (changed("data", ["a"]), r"data \['a'\]: Input should be a valid string"),
        (changed("evaluation"), "evaluation: Field required"),
        (changed("evaluation.valid.loss"), r"evaluation\.valid\.loss: Field required"),
        (
            changed("evaluation.valid.loss", "1"),
            r"evaluation\.valid\.loss '1': Input should be a valid number",
        ),
        (changed("evaluation.test"), r"evaluation\.test: Field required"),
        (changed("evaluation.law", {}), r"evaluation\.law\.perplexity: Field required"),
        (
            changed("evaluation.law", {"perplexity": None}),
            r"evaluation\.law\.perplexity None: Input should be a valid number",
        ),
        (changed("machine", 2), "machine 2: Input should be a valid string"),
        (changed("versions.fairseq_sffn"), r"versions\.fairseq_sffn: Field required"),
        (changed("training.train", [{}]), r"training\.train\[0\]\.update: Field required"),
        (changed("training.train", {}), r"training\.train {}: Input should be a valid array"),
        (
            changed("training.train", [{"update": 1, "loss": "x"}]),
            r"training\.train\[0\]\.loss 'x': Input should be a valid number",
        ),
        (changed("training.tokens_per_second"), r"training\.tokens_per_second: Field required"),
        (changed("routing", []), r"routing \[\]: Input should be an object"),
        (changed("routing.3.counts"), r"routing\.3\.counts: Field required"),
        (
            changed("routing.3.blocks", [1]),
            r"routing\.3\.blocks\[0\] 1: Input should be a valid array",
        ),
        (
            changed("routing.3.counts", [1.5]),
            r"routing\.3\.counts\[0\] 1\.5: Input should be a valid integer",
        ),
        (changed("zero_shot", {}), r"zero_shot\.tasks: Field required"),
        (
            changed("zero_shot.tasks", [{"task": "piqa"}]),
            r"zero_shot\.tasks\[0\]\.documents: Field required",
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
