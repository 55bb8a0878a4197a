"""The console scripts, in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import commands
from tests.commands import ROOT, USER_DIR, losses, override
from tests.integration.flags import CONFIG_DIR, OF_MODEL, RECIPE, SENTENCES, SMALLER
from tests.integration.outputs import hypotheses, last_checkpoint


def script(name: str, *arguments: object, cwd: Path, stdin: str = "") -> str:
    """Run a console script and return its output."""
    process = subprocess.run(
        [Path(sys.executable).parent / f"fairseq-{name}", *map(str, arguments)],
        cwd=cwd,
        input=stdin,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout + process.stderr


@pytest.fixture(scope="module")
def scripted(
    data_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[int, str]]:
    """Train by the README's command from the project root. Return data, folder of the checkpoints,
    and losses."""
    folder = tmp_path_factory.mktemp("scripts")
    data = shutil.copytree(data_bin, folder / "data")
    for kind in ("bin", "idx"):  # the validation split is too short for a batch at 128 tokens
        shutil.copy(data / f"train.{kind}", data / f"valid.{kind}")
    log = script(
        *("train", data, "--user-dir", "fairseq_sffn", "--task", "language_modeling"),
        *("--arch", "transformer_lm_avgk_tiny", "--criterion", "sffn_cross_entropy"),
        *("--optimizer", "adam", "--lr", "1e-3", "--tokens-per-sample", "128"),
        *("--batch-size", "16", "--max-update", "3", "--cpu", "--save-dir", folder / "ckpt"),
        *("--log-format", "json", "--log-interval", "1"),
        cwd=ROOT,
    )
    return data, folder / "ckpt", losses(log)


def test_script_trains_from_the_project_root(
    scripted: tuple[Path, Path, dict[int, str]], tmp_path: Path
) -> None:
    _, save_dir, by_script = scripted
    assert list(by_script) == [1, 2, 3] and (save_dir / "checkpoint_last.pt").is_file()
    state = last_checkpoint(save_dir)
    assert state["cfg"]["common"]["user_dir"] == "fairseq_sffn"
    assert state["model"]["decoder.layers.3.fc1.memory.keys"].shape == (16 * 512, 128)


def test_script_evaluates_from_another_directory(
    scripted: tuple[Path, Path, dict[int, str]], tmp_path: Path
) -> None:
    data, save_dir, _ = scripted
    checkpoint = save_dir / "checkpoint_last.pt"
    log = script(
        *("eval-lm", data, "--user-dir", USER_DIR, "--path", checkpoint, "--cpu"), cwd=tmp_path
    )
    assert "the model has 128 positions; evaluating at 128" in log
    in_process = commands.apply("eval-lm", data, checkpoint, "--tokens-per-sample", "128")
    assert commands.perplexity(log) == commands.perplexity(in_process)


def test_script_generates(scripted: tuple[Path, Path, dict[int, str]], tmp_path: Path) -> None:
    data, save_dir, _ = scripted
    output = script(
        *("generate", data, "--user-dir", USER_DIR, *SENTENCES, "--batch-size", "16"),
        *("--path", save_dir / "checkpoint_last.pt", "--cpu", "--beam", "1", "--max-len-b", "8"),
        cwd=tmp_path,
    )
    assert len(hypotheses(output)) == 40


def test_script_is_interactive(scripted: tuple[Path, Path, dict[int, str]], tmp_path: Path) -> None:
    data, save_dir, _ = scripted
    output = script(
        *("interactive", data, "--user-dir", "fairseq_sffn", "--task", "language_modeling"),
        *("--path", save_dir / "checkpoint_last.pt", "--cpu", "--beam", "1", "--max-len-b", "9"),
        cwd=ROOT,
        stdin="the n1 v2\n",
    )
    assert hypotheses(output)["0"][0].startswith("the n1 v2 ")


def test_script_trains_with_hydra(data_bin: Path, tmp_path: Path) -> None:
    log = script(
        *("hydra-train", "--config-dir", CONFIG_DIR, "--config-name", "avgk_tiny", *SMALLER),
        *(override("task.data", data_bin), override("common.user_dir", USER_DIR)),
        *(override("hydra.run.dir", tmp_path), *OF_MODEL["avgk"]),
        cwd=ROOT,
    )
    by_arch = commands.train(data_bin, tmp_path / "arch", "avgk", *RECIPE)
    assert losses(log) == losses(by_arch)
    by_hydra = last_checkpoint(tmp_path / "checkpoints")["cfg"]
    assert by_hydra["model"] == last_checkpoint(tmp_path / "arch")["cfg"]["model"]
