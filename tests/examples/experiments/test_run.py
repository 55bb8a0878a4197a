"""Which runs ``experiments run`` trains, and what it looks at before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.__main__ import main
from experiments.runner import Runner
from tests.examples.experiments.trial import AVGK, UPDATES, Trial, trained


def test_a_learning_rate_that_diverges_is_not_chosen(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    rows = '{ label = "dense", model = "dense" }'
    trial = Trial(tmp_path, data_bin, rows, rates="[1e30, 1e-2]")
    trial.run()
    results = list(trial.results().values())
    assert trained(calls) == len(results) == 3
    by_rate = {(r["lr"], r["updates"]): r["evaluation"] for r in results}
    assert by_rate[1e30, UPDATES // 2] == {"valid": {"loss": None}}
    assert list(by_rate[0.01, UPDATES // 2]) == ["valid"]
    assert list(by_rate[0.01, UPDATES]) == ["valid", "test", "law"]
    assert len(list(trial.work.glob("*/checkpoints/checkpoint_last.pt"))) == 1
    trial.run()
    assert trained(calls) == 3


def test_no_learning_rate_can_be_used(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    rows = '{ label = "dense", model = "dense" }'
    trial = Trial(tmp_path, data_bin, rows, rates="[1e30, 1e31]")
    with pytest.raises(SystemExit, match=r"'dense': learning_rates 1e\+30, 1e\+31 .* all diverged"):
        trial.run()
    assert trained(calls) == 2


def test_a_row_that_asks_for_what_the_sweep_trained(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    """The row trains it again, and evaluates it on all sets."""
    rows = '{ label = "short", model = "dense", length = 0.5 }'
    trial = Trial(tmp_path, data_bin, rows, rates="[1e-2, 1e-3]")
    trial.run()
    results = trial.results().values()
    assert trained(calls) == 3 and len(results) == 2
    assert sorted(len(r["evaluation"]) for r in results) == [1, 3]
    assert all(len(r["training"]["train"]) == UPDATES // 2 for r in results)


def test_finalists_are_trained_to_the_end(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    """The row is one of them, and is not trained again."""
    rows = '{ label = "dense", model = "dense" }'
    trial = Trial(tmp_path, data_bin, rows, rates="[1e-3, 1e-2]")
    with trial.scale.open("a") as scale:
        scale.write("init_scales = [1, 8]\nfinalists = 2\n")
    trial.run()
    results = list(trial.results().values())
    short = [r for r in results if r["updates"] == UPDATES // 2]
    finals = [r for r in results if r["updates"] == UPDATES]
    assert trained(calls) == len(results) == 6 and len(finals) == 2
    models = [("dense", ""), ("hash_layer", "--sffn-expansion 1 --sffn-init-scale 8")]
    assert {(r["model"], r["flags"]) for r in short} == {*models}
    losses = sorted((r["evaluation"]["valid"]["loss"], r["lr"], r["flags"]) for r in short)
    assert {(r["lr"], r["flags"]) for r in finals} == {(lr, flags) for _, lr, flags in losses[:2]}
    assert all([*r["evaluation"]] == ["valid", "test", "law"] for r in finals)
    trial.run()
    assert trained(calls) == 6


def test_the_sweep_is_looked_at_before_any_training(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    rows = '{ label = "dense", model = "dense", batch = 3 }'
    trial = Trial(tmp_path, data_bin, rows, "[1e-2, 2e-2]")
    with trial.scale.open("a") as scale:
        scale.write("[launchers.three]\nprocesses = 3\n")
    with pytest.raises(
        SystemExit, match="row 'dense': batch_size 8: is not divided by 3 processes"
    ):
        trial.run()
    assert calls == []


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ('model = "avgkk"', "t, row 'b': --arch transformer_lm_avgkk_tiny: is unknown; there is"),
        (
            'model = "dense", flags = "--no-such 3"',
            "row 'b': .*unrecognized arguments: --no-such 3",
        ),
        ('model = "avgk", flags = "--sffn-block-size 7"', "t, row 'b': .*--sffn-block-size 7"),
        ('model = "avgk", flags = "--sffn-gate x"', "row 'b': .*--sffn-gate: invalid choice: 'x'"),
    ],
)
def test_all_rows_are_looked_at_before_any_is_trained(
    row: str, error: str, tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    rows = f'{{ label = "a", model = "dense" }}, {{ label = "b", {row} }}'
    trial = Trial(tmp_path, data_bin, rows)
    with pytest.raises(SystemExit, match=error) as stopped:
        trial.run()
    assert "\n" not in str(stopped.value)
    assert calls == [] and trial.results() == {}


def test_tables_that_train_nothing_need_no_text(
    tmp_path: Path, data_bin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense", seeds = [] }')
    trial.table.write_text(trial.table.read_text().replace("perplexity", "taxonomy"))
    trial.scale.write_text(trial.scale.read_text().replace(str(data_bin), "nowhere"))
    trial.run()
    assert "nothing is trained" in capsys.readouterr().out


def test_tables_of_the_same_name(tmp_path: Path, data_bin: Path, calls: list[list[str]]) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    other = tmp_path / "other" / trial.table.name
    other.parent.mkdir()
    shutil.copy(trial.table, other)
    with pytest.raises(SystemExit, match=r"t\.toml, .*other/t\.toml: are tables of the same name"):
        main(["run", str(trial.table), str(other), "--scale", str(trial.scale)])
    assert calls == []


def test_domains_under_other_names(tmp_path: Path, data_bin: Path, calls: list[list[str]]) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    trial.run()
    (trial.folder / "domains" / "law").rename(trial.folder / "domains" / "laws")
    before = len(calls)
    with pytest.raises(SystemExit, match=r"domains laws: .*/dense-.*\.json has law; name them"):
        trial.run()
    assert len(calls) == before


def test_experiments_without_texts_out_of_domain(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    lines = trial.scale.read_text().splitlines(keepends=True)
    trial.scale.write_text("".join(line for line in lines if not line.startswith("domains")))
    trial.run()
    (result,) = trial.results().values()
    assert list(result["evaluation"]) == ["valid", "test"]


def test_another_text_has_trainings_and_results_of_its_own(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    trial.run()
    before = trial.results()
    with (trial.folder / "domains" / "law" / "test.bin").open("ab") as file:
        file.write(bytes(2))
    with pytest.raises(SystemExit, match=r"has results of the text .* with --results"):
        trial.run()
    trial.run("--results", str(tmp_path / "others"))
    assert trained(calls) == 2 and trial.results() == before
    assert [path.stem for path in (tmp_path / "others").iterdir()] == list(before)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--jobs", "0"), "--jobs 0: must be at least 1"),
        (("--launcher", "x"), "--launcher x: is none of local"),
    ],
)
def test_wrong_flags(flags: tuple[str, ...], error: str, tmp_path: Path, data_bin: Path) -> None:
    with pytest.raises(SystemExit, match=error):
        Trial(tmp_path, data_bin, f"{{ {AVGK} }}").run(*flags)


def test_a_launcher_that_takes_all_gpus_has_them_alone(
    tmp_path: Path, data_bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Runner, *args: Any) -> None:
        jobs.append(self.jobs)

    trial, jobs = Trial(tmp_path, data_bin, f"{{ {AVGK} }}"), []
    with trial.scale.open("a") as scale:
        scale.write('[launchers.local]\n[launchers.torchrun]\ncommand = "torchrun"\n')
    monkeypatch.setattr(Runner, "run", run)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(7))
    for flags in ([], ["--launcher", "torchrun"], ["--launcher", "torchrun", "--jobs", "3"]):
        words = ["run", str(trial.table), "--scale", str(trial.scale), *flags]
        main([*words, "--work", str(tmp_path / "work")])
    trial.scale.write_text(trial.scale.read_text().replace("--cpu", ""))
    main([*words[:4], "--work", str(tmp_path / "work")])  # on GPUs
    assert jobs == [7, 1, 3, 1]
