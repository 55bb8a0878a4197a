"""A dry run updates a narrow copy of each model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.experiments.trial import AVGK, Trial

pytestmark = pytest.mark.usefixtures("quick_start")


def test_a_dry_run_for_several_processes(
    tmp_path: Path, data_bin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Trial(tmp_path, data_bin, '{ label = "dense", model = "dense" }')
    with trial.scale.open("a") as scale:
        scale.write("[launchers.two]\nprocesses = 2\n")
    trial.run("--dry-run")
    assert "an update done\n1 runs are ready" in capsys.readouterr().out


def test_a_dry_run_of_blocks_that_are_sharded(
    tmp_path: Path, data_bin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = f"{{ {AVGK[:-1]} --sffn-expert-parallel 8\" }}, {{ label = 'd', model = 'dense' }}"
    Trial(tmp_path, data_bin, rows).run("--dry-run")
    said = capsys.readouterr().out
    assert said.count("an update done") == 2 and "2 runs are ready" in said
