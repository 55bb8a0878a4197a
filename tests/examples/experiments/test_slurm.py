"""Trainings that a batch system or a launcher starts."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from experiments.__main__ import main
from tests.examples.experiments.trial import Trial, trained


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


@pytest.mark.parametrize("submit", ["", "sbatch-that-is-not-here"])
def test_a_command_that_is_not_there(submit: str, tmp_path: Path, data_bin: Path) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    command = "" if submit else "torchrun-that-is-not-here"
    with trial.scale.open("a") as scale:
        scale.write(f'[launchers.batch]\nsubmit = "{submit}"\ncommand = "{command}"\n')
    with pytest.raises(SystemExit, match=f"^{submit or command}: cannot be run: No such file"):
        trial.run()
    assert not [*trial.work.glob("*/submitted")]
