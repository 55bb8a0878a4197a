"""Runs as Slurm jobs, with a stand-in for Slurm. ``tests/integration/slurm`` has the real one."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from experiments import progress, slurm
from experiments.__main__ import main
from fairseq_sffn.errors import UsageError
from tests.examples.experiments.trial import Trial, trained

LAUNCHER = """
[launchers.batch]
submit = "sbatch --partition main"
header = ["#SBATCH --nodes 1"]
at_once = 2
"""


class StandIn:
    """Slurm, as far as the command calls it.

    Attributes:
        submitted: the words of each call of sbatch.
        jobs: job -> key of its run.
        states: job -> state.
        runs: whether a job runs to its end at the first look at the queue.
    """

    def __init__(self) -> None:
        self.submitted: list[list[str]] = []
        self.jobs: dict[str, str] = {}
        self.states: dict[str, str] = {}
        self.runs = True
        self.silent = 0

    def call(self, words: list[str]) -> str:
        """Do what a command of Slurm does."""
        return self.sbatch(words) if words[0] == "sbatch" else self.squeue()

    def sbatch(self, words: list[str]) -> str:
        """Take an array of jobs."""
        self.submitted.append(words)
        number, script = len(self.submitted), Path(words[-1]).read_text()
        keys = next(line for line in script.splitlines() if line.startswith("keys=("))
        for task, key in enumerate(keys[6:-1].split()):
            self.jobs[f"{number}_{task}"] = key
            self.states[f"{number}_{task}"] = "PENDING"
        self.command = next(line for line in script.splitlines() if " --only " in line)
        return f"{number};cluster\n"

    def squeue(self) -> str:
        """Show all jobs, and run those that wait."""
        if self.silent:
            self.silent -= 1
            raise UsageError("squeue: no answer")
        shown = "".join(f"{job} {state}\n" for job, state in self.states.items())
        for job, state in self.states.items():
            if self.runs and state == "PENDING":
                words = shlex.split(self.command.partition(" --only ")[0])
                main([*words[4:], "--only", self.jobs[job]])
                self.states[job] = "COMPLETED"
        return shown


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(slurm, "call", made.call)
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    return made


@pytest.fixture
def trial(tmp_path: Path, data_bin: Path) -> Trial:
    made = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }', "[1e-2, 2e-2]")
    with made.scale.open("a") as scale:
        scale.write(LAUNCHER)
    return made


def test_a_table_from_the_sweep_to_the_rest(
    trial: Trial, stand_in: StandIn, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run is trained once. The controller that does not answer is asked again."""
    stand_in.silent = 1
    trial.run()
    said = capsys.readouterr()
    assert "squeue: no answer; trying again" in said.out
    assert "100% " in said.err and "2/2 runs" in said.err and "1/1 runs" in said.err
    assert trained(calls) == 3 and len(trial.results()) == 3
    (sweep, rest) = stand_in.submitted
    assert sweep[:3] == ["sbatch", "--partition", "main"]
    assert sweep[sweep.index("--array") + 1] == "0-1%2"
    assert rest[rest.index("--array") + 1] == "0-0%2"
    script = Path(sweep[-1]).read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    header, first = script.index("\n#SBATCH --nodes 1\n"), script.index("\nkeys=")
    assert script.startswith("#!/bin/bash\n#SBATCH --requeue") and header < first
    trial.scale.write_text(trial.scale.read_text().replace("at_once = 2\n", ""))
    trial.run()
    assert len(stand_in.submitted) == 2
    assert "at most 0 runs" in capsys.readouterr().out


def test_jobs_that_are_in_the_queue_are_followed(
    trial: Trial,
    stand_in: StandIn,
    calls: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C leaves the jobs where they are. The same command submits those that are lost."""
    stand_in.runs = False
    with monkeypatch.context() as patch:
        patch.setattr(slurm.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(
            SystemExit, match=r"the jobs go on, .* scancel --name experiments-small"
        ):
            trial.run()
    assert len(stand_in.submitted) == 1 and "CANCELLED" not in stand_in.states.values()
    del stand_in.states["1_1"]  # Slurm has forgotten it
    stand_in.runs = True
    trial.run()
    assert "1 runs have jobs already" in capsys.readouterr().out
    assert [words[words.index("--array") + 1] for words in stand_in.submitted[1:]] == ["0-0%2"] * 2
    assert trained(calls) == 3 and len(trial.results()) == 3


def test_jobs_that_end_without_a_result(
    trial: Trial, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are looked at twice, as files may come late. The others go on."""
    stand_in.runs, looks = False, []
    original = stand_in.squeue

    def squeue() -> str:
        if not looks:  # the first look is at the queue as it was submitted
            (trial.work / "jobs" / "1_0.log").write_text("a line\nCANCELLED DUE TO TIME LIMIT\n")
        looks.append(True)
        if len(looks) == 2:
            stand_in.states["1_0"] = "TIMEOUT"
            del stand_in.states["1_1"]
        return original()

    stand_in.squeue = squeue  # type: ignore[method-assign]
    with pytest.raises(SystemExit, match=r"2 of 2 runs failed: .*1_0\.log: job 1_0 ended as TIME"):
        trial.run()
    said = capsys.readouterr().out
    assert "TIMEOUT, without a result: CANCELLED DUE TO TIME LIMIT\n" in said
    assert "job 1_1 is gone from the queue, without a result" in said
    assert len(looks) == 3


@pytest.mark.parametrize("submit", ["", "sbatch-that-is-not-here", "false"])
def test_a_command_that_is_not_there(submit: str, tmp_path: Path, data_bin: Path) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    command = "" if submit else "torchrun-that-is-not-here"
    with trial.scale.open("a") as scale:
        scale.write(f'[launchers.batch]\nsubmit = "{submit}"\ncommand = "{command}"\n')
    reason = "" if submit == "false" else "cannot be run: No such file"
    with pytest.raises(SystemExit, match=f"^{submit or command}: {reason}"):
        trial.run()
    assert not [*trial.work.glob("*/job")]


def test_a_job_is_named_by_its_place_in_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """One job has the number of the array, which names all jobs."""
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm.own_job() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm.own_job() == "7"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert slurm.own_job() == "7_0"
