"""``experiments run`` from data to results, on a small corpus."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary

from experiments import training
from experiments.__main__ import main
from experiments.data import fingerprint
from experiments.files import Launcher, load_scale, load_table
from experiments.plan import row_runs, train_arguments
from experiments.processes import last_words
from experiments.runner import Runner
from experiments.training import updates_of
from fairseq_sffn.errors import UsageError
from fairseq_sffn.tools import cli
from fairseq_sffn.tools.training_log import log_records
from fairseq_sffn.tools.zero_shot_tasks import TASKS
from tests import commands

pytestmark = pytest.mark.usefixtures("quick_start")
UPDATES = 8
EXPERIMENTS = commands.ROOT / "examples" / "experiments"


class Trial:
    """A table and a scale in a folder, with the results of the command.

    Args:
        folder: folder of the files.
        data: binarised corpus.
        rows: rows of the table.
        rates: learning rates to choose from.
    """

    def __init__(self, folder: Path, data: Path, rows: str, rates: str = "[1e-2]") -> None:
        self.folder, self.data = folder, data
        self.table, self.scale = folder / "t.toml", folder / "small.toml"
        shutil.copytree(data, folder / "domains" / "law")
        self.table.write_text(f'title = "T"\nkind = "perplexity"\nrows = [{rows}]\n')
        flags = shlex.join(commands.SMALL)
        self.scale.write_text(
            f'size = "tiny"\ndata = "{data}"\ndomains = "{folder / "domains"}"\n'
            f"dictionary = {len(Dictionary.load(str(data / 'dict.txt')))}\nupdates = {UPDATES}\n"
            "batch_size = 8\ntokens_per_sample = 16\nffn_embed_dim = 32\nsweep_share = 0.5\n"
            f"learning_rates = {rates}\ntokens_per_second = 1000\n"
            f'flags = "--optimizer adam --cpu --num-workers 0 {flags}"\n'
        )

    @property
    def work(self) -> Path:
        """The folder of the runs."""
        scale = load_scale(self.scale)
        return self.folder / "work" / scale.name / fingerprint(scale)

    def run(self, *flags: str) -> None:
        """Run the command."""
        main(
            [
                *("run", str(self.table), "--scale", str(self.scale), "--jobs", "1"),
                *("--work", str(self.folder / "work"), *flags),
            ]
        )

    def ask_for_zero_shot(self, encoder: str = "--bpe characters") -> None:
        """Add zero-shot tasks to the table, with a file for each task."""
        self.table.write_text("zero_shot = true\n" + self.table.read_text())
        requests = self.folder / "requests"
        requests.mkdir()
        for task in TASKS:
            (requests / f"{task}.jsonl").touch()
        with self.scale.open("a") as scale:
            scale.write(f'requests = "{requests}"\nencoder = "{encoder}"\n')

    def results(self) -> dict[str, dict[str, Any]]:
        """Return key -> result."""
        folder = self.folder / "results" / "small"
        return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


@pytest.fixture()
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the processes that are started. They run in this process instead, which is faster."""
    started: list[list[str]] = []

    def call(self: Runner, command: list[str], folder: Path, stdout: Any, stderr: Any) -> int:
        module, *arguments = command[command.index("-m") + 1 :]
        started.append([module, *arguments])
        try:
            if module == "fairseq_cli.train":
                stdout.write(commands.run("train", *arguments))
            else:
                with contextlib.redirect_stdout(stdout):
                    cli.main(arguments)
        except (Exception, SystemExit):
            stdout.write(traceback.format_exc())
            return 1
        return 0

    monkeypatch.setattr(Runner, "call", call)
    return started


def trained(calls: list[list[str]]) -> int:
    """Return how many runs were trained."""
    return sum(call[0] == "fairseq_cli.train" for call in calls)


def test_trains_evaluates_and_does_nothing_twice(
    tmp_path: Path, data_bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is a process."""
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense", seeds = [2] }')
    trial.run()
    ((key, result),) = trial.results().items()
    assert (result["model"], result["seed"], result["lr"]) == ("dense", 2, 0.01)
    assert key.startswith("dense-")
    assert list(result["evaluation"]) == ["valid", "test", "law"]
    assert result["evaluation"]["test"] == result["evaluation"]["law"]  # the same text
    assert 1 < result["evaluation"]["test"]["perplexity"] < 100
    assert [r["update"] for r in result["training"]["train"]] == list(range(1, UPDATES + 1))
    assert result["training"]["tokens_per_second"] > 0
    assert result["routing"] == {} and "fairseq-train" in result["command"]
    state = torch.load(trial.work / key / "checkpoints" / "checkpoint_last.pt", weights_only=True)
    assert state["last_optimizer_state"] is None

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    trial.run()
    assert trial.results() == {key: result}


AVGK = 'label = "Avg-K", model = "avgk", flags = "--sffn-block-size 8"'


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


def test_an_interrupted_training_goes_on(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    trial = Trial(tmp_path, data_bin, f"{{ {AVGK} }}")
    scale = load_scale(trial.scale)
    (run,) = row_runs(load_table(trial.table).rows[0], scale, 0.01)
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


def test_zero_shot_tasks_are_added_to_what_is_done(
    tmp_path: Path, data_bin: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(tmp_path, data_bin, f"{{ {AVGK} }}")
    trial.run()
    before = trial.results()
    monkeypatch.setattr(Runner, "zero_shot", lambda self, checkpoint: {"tasks": []})
    monkeypatch.setattr(training, "versions", lambda: {"fairseq_sffn": "a later one"})
    monkeypatch.setattr(training, "machine", lambda device: "another one")
    trial.ask_for_zero_shot()
    trial.run()
    ((key, result),) = trial.results().items()
    assert result == before[key] | {"zero_shot": {"tasks": []}} and "test" in result["evaluation"]
    assert [call[1] for call in calls if call[0] == "fairseq_sffn"] == ["evaluate"]
    assert trained(calls) == 1


def test_what_was_found_is_kept_where_a_zero_shot_task_fails(
    tmp_path: Path, data_bin: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Runner, checkpoint: Path) -> None:
        raise UsageError("no such task")

    trial = Trial(tmp_path, data_bin, f"{{ {AVGK} }}")
    trial.ask_for_zero_shot()
    monkeypatch.setattr(Runner, "zero_shot", fail)
    with pytest.raises(SystemExit, match="no such task"):
        trial.run()
    (result,) = trial.results().values()
    assert "test" in result["evaluation"] and "zero_shot" not in result


@pytest.mark.parametrize(
    ("gone", "encoder", "error"),
    [
        ("piqa", "--bpe characters", r"requests '.*' of scale small: has no piqa\.jsonl; see"),
        ("", "", "encoder '' of scale small: has no --bpe"),
        ("", "--bpe", "encoder '--bpe' of scale small: has no --bpe"),
        (
            "",
            "--sentencepiece-model x --bpe sentencepiece",
            "encoder of scale small: --sentencepiece-model x: there is no such file",
        ),
    ],
)
def test_zero_shot_is_looked_at_before_any_training(
    gone: str, encoder: str, error: str, tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    trial = Trial(tmp_path, data_bin, f"{{ {AVGK} }}")
    trial.ask_for_zero_shot(encoder)
    if gone:
        (tmp_path / "requests" / f"{gone}.jsonl").unlink()
    with pytest.raises(SystemExit, match=error):
        trial.run()
    assert calls == []


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


def test_the_others_go_on_after_a_training_that_failed(
    tmp_path: Path,
    data_bin: Path,
    calls: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The failure is reported in one line."""

    def fail(self: Runner, command: list[str], *args: Any, stdout: Any, **others: Any) -> int:
        if command[command.index("--seed") + 1 :][:1] != ["1"]:
            return call(self, command, *args, stdout=stdout, **others)
        stdout.write("Traceback\nOSError: no room\n\n")
        return 1

    call = Runner.call
    monkeypatch.setattr(Runner, "call", fail)
    trial = Trial(tmp_path, data_bin, '{ label = "a", model = "dense", seeds = [1, 2, 3] }')
    found = {"evaluation": {"valid": {"loss": 1.0}}, "routing": {}}
    monkeypatch.setattr(Runner, "evaluate", lambda *args: found)
    with pytest.raises(SystemExit) as stopped:
        trial.run()
    said = r"1 of 3 runs failed: (.*train\.log): training failed: OSError: no room"
    message = re.fullmatch(said, str(stopped.value))
    assert message and Path(message[1]).is_file()
    assert sorted(r["seed"] for r in trial.results().values()) == [2, 3]
    assert "failed: " in capsys.readouterr().out


def test_the_others_go_on_after_an_error_that_nobody_foresaw(
    tmp_path: Path, data_bin: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [OSError("no space left on device")]
    monkeypatch.setattr(
        training, "drop_optimizer", lambda checkpoint: full and (_ for _ in ()).throw(full.pop())
    )
    trial = Trial(tmp_path, data_bin, '{ label = "a", model = "dense", seeds = [1, 2] }')
    with pytest.raises(SystemExit, match=r"1 of 2 runs failed: OSError: no"):
        trial.run()
    assert [r["seed"] for r in trial.results().values()] == [2]
    trial.run()
    assert len(trial.results()) == trained(calls) == 2


@pytest.mark.parametrize("submit", ["", "sbatch-that-is-not-here"])
def test_a_command_that_is_not_there(submit: str, tmp_path: Path, data_bin: Path) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    command = "" if submit else "torchrun-that-is-not-here"
    with trial.scale.open("a") as scale:
        scale.write(f'[launchers.batch]\nsubmit = "{submit}"\ncommand = "{command}"\n')
    with pytest.raises(SystemExit, match=f"^{submit or command}: cannot be run: No such file"):
        trial.run()
    assert not [*trial.work.glob("*/submitted")]


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


def test_a_dry_run_for_several_processes(
    tmp_path: Path, data_bin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    with trial.scale.open("a") as scale:
        scale.write("[launchers.two]\nprocesses = 2\n")
    trial.run("--dry-run")
    assert "an update done\n1 runs are ready" in capsys.readouterr().out


def test_the_last_words_of_a_process() -> None:
    """torchrun's report on its processes is left out."""
    lines = [
        "| INFO | fairseq_cli.train | ...",
        "--sffn-block-size 7: does not divide",
        "",
        "E1127 10:00:00 11 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode)",
        "Traceback (most recent call last):",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:",
        "============================================================",
    ]
    assert last_words(lines) == "--sffn-block-size 7: does not divide"
    assert last_words(lines[:1]) == lines[0]
    assert last_words([]) == last_words(lines[3:]) == ""


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
    flags = "--sffn-block-size 8 --avgk-center --avgk-balance-rate 0.1"
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
    (run,) = row_runs(load_table(trial.table).rows[0], load_scale(trial.scale), 0.01)
    last = trial.work / run.key(load_scale(trial.scale)) / "checkpoints" / "checkpoint_last.pt"
    last.parent.mkdir(parents=True)
    last.write_text("half of")
    with pytest.raises(SystemExit, match=r"checkpoint_last\.pt: truncated, or not a") as stopped:
        trial.run()
    assert "\n" not in str(stopped.value) and calls == []


def test_no_learning_rate_can_be_used(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    rows = '{ label = "dense", model = "dense" }'
    trial = Trial(tmp_path, data_bin, rows, rates="[1e30, 1e31]")
    with pytest.raises(SystemExit, match=r"'dense': learning_rates 1e\+30, 1e\+31 .* all diverged"):
        trial.run()
    assert trained(calls) == 2


def test_domains_under_other_names(tmp_path: Path, data_bin: Path, calls: list[list[str]]) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    trial.run()
    (trial.folder / "domains" / "law").rename(trial.folder / "domains" / "laws")
    before = len(calls)
    with pytest.raises(SystemExit, match=r"domains laws: .*/dense-.*\.json has law; name them"):
        trial.run()
    assert len(calls) == before


def test_tables_of_the_same_name(tmp_path: Path, data_bin: Path, calls: list[list[str]]) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    other = tmp_path / "other" / trial.table.name
    other.parent.mkdir()
    shutil.copy(trial.table, other)
    with pytest.raises(SystemExit, match=r"t\.toml, .*other/t\.toml: are tables of the same name"):
        main(["run", str(trial.table), str(other), "--scale", str(trial.scale)])
    assert calls == []


def test_two_commands_train_a_run_once(
    tmp_path: Path, data_bin: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second waits for the first, and uses its result."""
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    trial.run()
    ((key, result),) = trial.results().items()
    path = trial.folder / "results" / "small" / f"{key}.json"
    path.unlink()
    started = len(calls)
    with (trial.work / key / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def other() -> None:
            while "another command trains it; waiting" not in capsys.readouterr().out:
                time.sleep(0.1)
            path.write_text(json.dumps(result))
            fcntl.flock(lock, fcntl.LOCK_UN)

        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        trial.run()
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert len(calls) == started


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


def test_a_batch_system_gets_each_training_once(
    tmp_path: Path, data_bin: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }', "[1e-2, 2e-2]")
    with trial.scale.open("a") as scale:
        scale.write('[launchers.batch]\nsubmit = "echo job"\nheader = ["#SBATCH --nodes 1"]\n')
    trial.run()
    said = capsys.readouterr().out
    assert said.count(": job ") == 2 and "the same command submits the others" in said
    trial.run()
    assert capsys.readouterr().out.count(": submitted before") == 2
    for _ in range(2):  # like the jobs: first the sweep, then the other run
        for script in trial.work.glob("*/job.sh"):
            text = script.read_text()
            assert text.startswith("#!/bin/bash\n#SBATCH --job-name dense-")
            assert "\n#SBATCH --nodes 1\n" in text
            trap, command = text.splitlines()[-2:]
            subprocess.run(["bash", "-c", trap], check=True)
            assert not (script.parent / "submitted").exists()
            main(shlex.split(command)[4:])
        trial.run()
    assert trained(calls) == 3 and len(trial.results()) == 3
    with pytest.raises(SystemExit, match="--only dense-x: is no run of t"):
        trial.run("--only", "dense-x")


def test_experiments_without_texts_out_of_domain(
    tmp_path: Path, data_bin: Path, calls: list[list[str]]
) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    lines = trial.scale.read_text().splitlines(keepends=True)
    trial.scale.write_text("".join(line for line in lines if not line.startswith("domains")))
    trial.run()
    (result,) = trial.results().values()
    assert list(result["evaluation"]) == ["valid", "test"]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ('model = "avgkk"', "t, row 'b': --arch transformer_lm_avgkk_tiny: is unknown; there is"),
        ('model = "avgk", flags = "--no-such 3"', "row 'b': .*unrecognized arguments: --no-such 3"),
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
    assert jobs == [7, 7, 1, 1, 3, 3, 1, 1]


def test_a_dry_run_of_blocks_that_are_sharded(
    tmp_path: Path, data_bin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = f"{{ {AVGK[:-1]} --sffn-expert-parallel 8\" }}, {{ label = 'd', model = 'dense' }}"
    Trial(tmp_path, data_bin, rows).run("--dry-run")
    said = capsys.readouterr().out
    assert said.count("an update done") == 2 and "2 runs are ready" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_trainings_end_with_the_command(number, data_bin, tmp_path):
    """Trainings finish an update and save, and the same command resumes them."""
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense", length = 10000 }')
    words = [
        "run",
        str(trial.table),
        "--scale",
        str(trial.scale),
        "--work",
        str(tmp_path / "work"),
    ]
    command = [sys.executable, "-W", "ignore", str(EXPERIMENTS), *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        for _ in range(3000):
            if any("train_inner" in log.read_text() for log in trial.work.glob("*/train.log")):
                break
            time.sleep(0.1)
        assert trainings(trial.work)
        run.send_signal(number)
        assert run.wait(timeout=600) != 0
    assert not trainings(trial.work)
    (log,) = trial.work.glob("*/train.log")
    ended = re.findall(r"SIGTERM: the training ends at update (\d+)", log.read_text())
    assert ended == [str(updates_of(log.parent / "checkpoints" / "checkpoint_last.pt"))]


def test_a_training_that_outlives_a_killed_command_is_waited_for(data_bin, tmp_path):
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense", length = 10000 }')
    words = [
        "run",
        str(trial.table),
        "--scale",
        str(trial.scale),
        "--work",
        str(tmp_path / "work"),
    ]
    command = [sys.executable, "-W", "ignore", str(EXPERIMENTS), *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        for _ in range(3000):
            if any("train_inner" in log.read_text() for log in trial.work.glob("*/train.log")):
                break
            time.sleep(0.1)
        run.kill()
    (training,) = trainings(trial.work)
    (lock,) = trial.work.glob("*/lock")
    with lock.open("a") as file:
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.kill(int(training), signal.SIGKILL)
        fcntl.flock(file, fcntl.LOCK_EX)  # free as soon as the training has ended


def trainings(work: Path) -> list[str]:
    """Return the processes that write to a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has just ended
            words = path.read_bytes().decode().split("\0")
            if f"{work}/" in "".join(words) and "fairseq_cli.train" in words:
                found.append(path.parent.name)
    return found
