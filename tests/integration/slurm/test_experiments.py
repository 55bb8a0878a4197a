"""``experiments run`` with the Slurm launcher of the paper's scale, under Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest

from experiments import progress, slurm
from experiments.slurm import Slurm
from tests import commands
from tests.examples.experiments.trial import Trial
from tests.integration.slurm import documented
from tests.integration.slurm.cluster import Cluster, call, free_ports, text

pytestmark = pytest.mark.usefixtures("quick_start")
PAPER = commands.EXAMPLES / "paper" / "scales" / "paper.toml"


@pytest.fixture(autouse=True)
def poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.5)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.5)


def add_launcher(trial: Trial, **changes: Any) -> None:
    """Add the launcher of the paper's scale, for one process, and a local one that is equal."""
    launcher = tomllib.loads(PAPER.read_text())["launchers"]["slurm"]
    port = free_ports(1)[0]
    launcher["header"] = [
        documented.on_cpus(line, port).replace("--nodes 2", "--nodes 1")
        for line in launcher["header"]
    ]
    launcher["command"] = documented.on_cpus(launcher["command"], port)
    launcher |= {"processes": 1, **changes}
    with trial.scale.open("a") as scale:
        scale.write("[launchers.slurm]\n")
        scale.writelines(f"{name} = {toml(value)}\n" for name, value in launcher.items())
        scale.write('[launchers.local]\ncommand = "torchrun --standalone --nproc_per_node 1"\n')


def toml(value: Any) -> str:
    """Return a value in TOML."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return f"'''{value}'''" if isinstance(value, str) else str(value)


def compared(result: dict[str, Any]) -> dict[str, Any]:
    """Return what depends neither on the launcher nor on the machine's load."""
    training = {k: v for k, v in result["training"].items() if k != "tokens_per_second"}
    return {k: v for k, v in result.items() if k != "command"} | {"training": training}


def records(log: Path) -> list[Any]:
    """Return the records of a training that has begun."""
    return commands.records(log.read_text())


@pytest.fixture
def trial(tmp_path: Path, data_bin: Path) -> Trial:
    return Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }', "[1e-2, 2e-2]")


def test_a_table(
    trial: Trial,
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A sweep and a run, one job at a time. A job is put back into the queue, and its training goes
    on. The command is interrupted, and follows the jobs when it is called again. The results are
    those of this machine without Slurm."""
    add_launcher(trial, at_once=1)
    trial.scale.write_text(trial.scale.read_text().replace("updates = 8\n", "updates = 400\n"))
    original = Slurm.states
    work, reasons = trial.work, list[str]()

    def states(self: Slurm) -> dict[str, str]:
        """Look at the queue. When a training has begun, put its job back and press Ctrl-C."""
        found = original(self)
        if not reasons and (logs := [log for log in work.glob("*/train.log") if records(log)]):
            reasons.append(call("squeue", "--noheader", "--format", "%T %r"))
            job = (logs[0].parent / "job").read_text()
            call("scancel", "--batch", "--signal", "USR1", job)
            os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.setattr(Slurm, "states", states)
    with pytest.raises(SystemExit, match="the jobs go on, and the same command follows them"):
        trial.run()
    assert "PENDING JobArrayTaskLimit" in reasons[0]
    trial.run()
    said = capsys.readouterr()
    assert said.out.count("job array") == 2 and "2 runs have jobs already" in said.out
    assert re.search(r"100% .* 2/2 runs", said.err) and re.search(r"100% .* 1/1 runs", said.err)
    assert sum("SIGTERM: the training ends" in log.read_text() for log in work.glob("*/*.log")) == 1
    found = trial.results()
    assert len(found) == 3
    flags = ("--results", str(trial.folder / "local"), "--work", str(trial.folder / "local_work"))
    trial.run("--launcher", "local", *flags)
    for path in (trial.folder / "local").glob("*.json"):
        assert compared(json.loads(path.read_text())) == compared(found.pop(path.stem))
    assert not found


def test_jobs_that_fail_and_jobs_that_are_cancelled(
    trial: Trial,
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The header of the script ends the first job, and keeps the second one from its run."""
    header = "[ $SLURM_ARRAY_TASK_ID = 1 ] && echo waits && sleep 300; echo broken; exit 3"
    add_launcher(trial, header=[header])
    original, logs = Slurm.states, trial.work / "jobs"

    def states(self: Slurm) -> dict[str, str]:
        """Look at the queue, and cancel the second job when it has begun."""
        found = original(self)
        for job, state in found.items():
            if state == "RUNNING" and "waits" in text(logs / f"{job}.log"):
                call("scancel", job)
        return found

    monkeypatch.setattr(Slurm, "states", states)
    with pytest.raises(SystemExit, match="2 of 2 runs failed: "):
        trial.run()
    said = capsys.readouterr().out
    assert re.search(r"job \d+_0 ended as FAILED, without a result: broken", said)
    assert re.search(r"job \d+_1 ended as CANCELLED, without a result: .* CANCELLED AT", said)
