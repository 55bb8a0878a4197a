"""Several processes for the tests of this folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SAME_SENTENCES = ("--curriculum", "1000000", "--dropout", "0")
"""fairseq deals consecutive batches to the ranks, so that they share the batch of one process."""


def torchrun(world_size: int, *command: Any) -> list[str]:
    """The command line that starts so many processes."""
    launcher = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone")
    return [*launcher, "--nproc_per_node", str(world_size), *map(str, command)]


def run(world_size: int, *command: Any) -> "subprocess.CompletedProcess[str]":
    """Runs so many processes to their end. Collective operations give up after half an hour, so a
    job that waits for a rank which is gone is told from a slow machine."""
    return subprocess.run(
        torchrun(world_size, *command),
        **{"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 1200},
    )


def training(data: Path, save_dir: Path, model: str, *flags: str) -> list[str]:
    """The arguments of ``commands.train``."""
    arguments: list[str] = []
    original, commands.run = (
        commands.run,
        lambda *words: arguments.extend(map(str, words[1:])) or "",
    )
    try:
        commands.train(data, save_dir, model, *flags)
    finally:
        commands.run = original
    return arguments


def train(
    world_size: int, folder: Path, jobs: dict[str, list[str]], expect: int = 0
) -> dict[str, str]:
    """Runs trainings in so many processes, one after the other, and gives rank 0's logs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run(world_size, HERE / "worker.py", folder / "jobs.json")
    assert done.returncode == expect, done.stderr[-4000:]
    return {name: (folder / f"{name}.0.log").read_text() for name in jobs}
