"""examples/paper: its tables, scripts and documents."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.files import load_scale, load_table
from experiments.plan import Setting, row_runs

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples" / "paper"
TABLES = sorted(path.stem for path in PAPER.glob("*.toml"))
DOCUMENTS = (PAPER / "README.md",)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Link this checkout in a folder with an odd name. Its virtual environment has the Python of
    the tests."""
    tmp_path = tmp_path / "a b'c $d [e] (f) & g"
    paper = tmp_path / "examples" / "paper"
    paper.mkdir(parents=True)
    for path in (*(ROOT / "examples").iterdir(), *PAPER.iterdir()):
        if path != PAPER:
            (tmp_path / path.relative_to(ROOT)).symlink_to(path)
    for name in ("fairseq_sffn", "setup.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    made_from = (ROOT / "examples" / "requirements.txt", ROOT / "setup.py")
    environment = tmp_path / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "made-from.txt").write_text("".join(path.read_text() for path in made_from))
    activate = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n"
    (environment / "bin" / "activate").write_text(activate)
    return tmp_path


def bash(checkout: Path, script: str, *flags: str, scale: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(checkout / "examples" / "paper" / script), *flags],
        env=os.environ | {"SCALE": scale, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_every_table_has_a_script_that_all_of_them_call() -> None:
    for table in TABLES:
        assert (PAPER / f"{table}.sh").read_text().splitlines()[-1] == (
            f'exec bash "$(dirname "$0")/table.sh" {table} "$@"'
        )
    trained = {table for table in TABLES if load_table(PAPER / f"{table}.toml").kind != "taxonomy"}
    *_, last = (PAPER / "all.sh").read_text().splitlines()
    assert set(last.split('table.sh" ')[1].removesuffix(' "$@"').split()) == trained


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_every_row_is_a_training_of_its_own(scale: str) -> None:
    loaded = load_scale(PAPER / "scales" / f"{scale}.toml")
    for name in TABLES:
        table = load_table(PAPER / f"{name}.toml")
        keys = {
            row: [c.key(loaded) for c in row_runs(row, loaded, Setting(0.001))]
            for row in table.rows
        }
        drawn = [(row.group, key) for row, of_row in keys.items() for key in of_row]
        assert len(drawn) == len(set(drawn)), name


def test_a_dry_run_at_the_papers_scale(checkout: Path) -> None:
    """Two rows of a table are enough, as each takes ten seconds."""
    table = checkout / "examples" / "paper" / "aggregates.toml"
    lines = table.read_text().splitlines()
    table.unlink()
    rows = ("label = ", '"dense"', '"min"')
    kept = [line for line in lines if rows[0] not in line or any(row in line for row in rows[1:])]
    table.write_text("\n".join(kept))
    done = bash(checkout, "aggregates.sh", "--dry-run", scale="paper")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("an update done") == 2
    assert "vanilla_m --sffn-block-size 64 --vanilla-m-aggregate min: 858," in done.stdout
    assert done.stdout.endswith("2 runs are ready\n")


def test_a_scale_that_is_none(checkout: Path) -> None:
    done = bash(checkout, "main.sh", scale="moon")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "SCALE=moon: there is no examples/paper/scales/moon.toml\n"


def test_documents_show_what_the_results_give() -> None:
    main(
        [
            *("report", str(PAPER), "--scale", str(PAPER / "scales" / "laptop.toml")),
            *("--check", "--write", *map(str, DOCUMENTS)),
        ]
    )
    for document in DOCUMENTS:
        for link in re.findall(r"!\[.*?\]\((.*?)\)", document.read_text()):
            assert (document.parent / link).is_file(), link
