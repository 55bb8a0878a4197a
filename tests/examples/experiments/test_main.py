"""The command from any folder, and its README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from experiments.files import Launcher, Row, Scale, Table, load_table
from tests.commands import ROOT

EXPERIMENTS = ROOT / "examples" / "experiments"
README = (EXPERIMENTS / "README.md").read_text()


def test_from_another_folder(tmp_path: Path) -> None:
    """No module of the package hides a module of Python with the same name."""
    command = [sys.executable, str(EXPERIMENTS), "report", "no-folder", "--scale", "none.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("none.toml: cannot be read: ")
    assert "Traceback" not in done.stderr


def test_a_library_that_is_missing_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError('gone', name='pydantic')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(EXPERIMENTS), "report"]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("pydantic is not installed: pip install -e ")


@pytest.mark.parametrize("kind", [Table, Row, Scale, Launcher])
def test_the_readme_describes_every_key(kind: type) -> None:
    rows = re.findall(r"^\| (`.*?) \|", README, re.M)
    described = {key for row in rows for key in re.findall(r"`\[*(\w+)", row)}
    assert {field.name for field in fields(kind)} - {"name"} <= described  # type: ignore[arg-type]


def test_the_example_is_a_table(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    path = tmp_path / "my-table.toml"
    path.write_text(text)
    assert [row.label for row in load_table(path).rows] == ["dense", "Avg-K, g = 16"]
