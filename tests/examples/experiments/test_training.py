"""The training of a run: interrupted, begun anew, diverged, ended."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments import training
from experiments.files import Launcher, load_scale, load_table
from experiments.plan import Setting, row_runs, train_arguments
from experiments.runner import Runner
from fairseq_sffn.tools.training_log import log_records
from tests import commands
from tests.examples.experiments.trial import AVGK, UPDATES, Trial, trained


def test_an_interrupted_training_goes_on(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    trial = Trial(tmp_path, data_bin, f"{{ {AVGK} }}")
    scale = load_scale(trial.scale)
    (run,) = row_runs(load_table(trial.table).rows[0], scale, Setting(0.01))
    folder = trial.work / run.key(scale)
    folder.mkdir(parents=True)
    arguments = train_arguments(
        *(run, scale, Launcher(), str(data_bin), str(folder / "checkpoints"), commands.USER_DIR)
    )
    log = commands.run("train", *arguments, "--max-update", "5")
    (folder / "train.log").write_text(log)
    trial.run()
    text = (folder / "train.log").read_text()
    assert text.startswith(log) and "Loaded checkpoint" in text[len(log) :]
    resumed = folder / "resumed.log"
    resumed.write_text(text[len(log) :])
    again = [record["num_updates"] for kind, record in log_records(resumed)]
    assert min(again) == 6 and max(again) == UPDATES
    (result,) = trial.results().values()
    assert [r["update"] for r in result["training"]["train"]] == list(range(1, UPDATES + 1))
    assert len(result["routing"]["1"]["counts"]) == 64
    assert trained(calls) == 1


def test_a_training_that_begins_anew_has_a_log_of_its_own(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    trial.run()
    ((key, _),) = trial.results().items()
    log = trial.work / key / "train.log"
    log.write_text('a | INFO | train_inner | {"num_updates": "99", "loss": "1"}\n')
    (trial.folder / "results" / "small" / f"{key}.json").unlink()
    shutil.rmtree(trial.work / key / "checkpoints")
    trial.run()
    assert max(record["num_updates"] for _, record in log_records(log)) == UPDATES


def test_a_training_whose_checkpoint_is_gone_is_done_again(
    tmp_path: Path, data_bin: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(tmp_path, data_bin, f"{{ {AVGK} }}")
    trial.run()
    ((key, before),) = trial.results().items()
    shutil.rmtree(trial.work / key / "checkpoints")
    monkeypatch.setattr(Runner, "zero_shot", lambda self, checkpoint: {"tasks": []})
    trial.ask_for_zero_shot()
    trial.run()
    assert trained(calls) == 2
    assert trial.results()[key]["evaluation"] == before["evaluation"]  # exactly
    assert trial.results()[key]["zero_shot"] == {"tasks": []}


@pytest.mark.parametrize(
    ("error", "diverges"),
    [
        ("Minimum loss scale reached (0.0001). Your loss is probably exploding.", True),
        ("Fatal error: gradients are inconsistent between workers. Try --ddp-backend", False),
    ],
)
def test_what_is_a_divergence(
    error: str, diverges: bool, tmp_path: Path, data_bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(self: Runner, command: list[str], folder: Path, stdout: Any, stderr: Any) -> int:
        stdout.write(f"Traceback\nFloatingPointError: {error}\n")
        return 1

    monkeypatch.setattr(Runner, "call", call)
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    if diverges:
        trial.run()
    else:
        with pytest.raises(SystemExit, match=r"training failed: .*inconsistent between workers"):
            trial.run()
    assert [r["evaluation"] for r in trial.results().values()] == (
        [{"valid": {"loss": None}}] if diverges else []
    )


def test_versions_are_those_of_the_training(
    tmp_path: Path, data_bin: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version is not that of a later command that finds the training at its end."""
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    monkeypatch.setattr(training, "versions", lambda: {"fairseq_sffn": "first"})
    trial.run()
    ((key, _),) = trial.results().items()
    (trial.folder / "results" / "small" / f"{key}.json").unlink()
    (trial.work / key / "trained.json").unlink()
    monkeypatch.setattr(training, "versions", lambda: {"fairseq_sffn": "second"})
    trial.run()
    assert trial.results()[key]["versions"] == {"fairseq_sffn": "first"} and trained(calls) == 1


def test_a_training_that_stops_early_has_no_result(
    tmp_path: Path, data_bin: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Runner.call
    monkeypatch.setattr(
        Runner,
        "call",
        lambda self, command, *args, **kw: call(self, [*command, "--max-update=1"], *args, **kw),
    )
    trial = Trial(tmp_path, data_bin, f"{{ {AVGK} }}")
    with pytest.raises(
        SystemExit, match=rf"checkpoint_last\.pt: is after 1 updates, not {UPDATES}"
    ):
        trial.run()
    assert trial.results() == {}


def test_a_training_at_its_end_is_not_trained_on(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    """A training may outlive its command. fairseq would add an update."""
    flags = "--sffn-block-size 8 --avgk-center --sffn-balance-rate 0.1"
    trial = Trial(tmp_path, data_bin, f'{{ label = "a", model = "avgk", flags = "{flags}" }}')
    trial.run()
    ((key, result),) = trial.results().items()
    (trial.folder / "results" / "small" / f"{key}.json").unlink()
    for name in ("started.json", "trained.json"):
        (trial.work / key / name).unlink()
    trial.run()
    assert trained(calls) == 1 and trial.results() == {key: result}


def test_a_checkpoint_that_cannot_be_read(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    trial = Trial(tmp_path, data_bin, f"{{ {AVGK} }}")
    (run,) = row_runs(load_table(trial.table).rows[0], load_scale(trial.scale), Setting(0.01))
    last = trial.work / run.key(load_scale(trial.scale)) / "checkpoints" / "checkpoint_last.pt"
    last.parent.mkdir(parents=True)
    last.write_text("half of")
    with pytest.raises(SystemExit, match=r"checkpoint_last\.pt: truncated, or not a") as stopped:
        trial.run()
    assert "\n" not in str(stopped.value) and calls == []
