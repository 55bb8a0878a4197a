"""Starts several processes, for the tests of this folder."""

import faulthandler
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from tests import commands

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SAME_SENTENCES = ("--curriculum", "1000000", "--dropout", "0")
"""fairseq deals consecutive batches to the ranks, so with these flags they share the batch of one
process."""
HANGS_SECONDS = 240
"""Time after which a job hangs, also on a slow machine. None takes 40 seconds on an idle one."""


def torchrun(world_size: int, *command: Any) -> list[str]:
    """Return the command line that starts so many processes."""
    launcher = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone")
    return [*launcher, "--nproc_per_node", str(world_size), *map(str, command)]


def run(world_size: int, *command: Any) -> "subprocess.CompletedProcess[str]":
    """Run so many processes to their end. Collective operations time out after half an hour, so a
    job that waits for a dead rank does not end by itself."""
    return subprocess.run(
        torchrun(world_size, *command),
        **{"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": HANGS_SECONDS},
    )


def training(data: Path, save_dir: Path, model: str, *flags: str) -> list[str]:
    """Return the arguments of ``commands.train``."""
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
    world_size: int, folder: Path, jobs: dict[str, list[str]], before: str = ""
) -> dict[str, str]:
    """Run trainings in so many processes, one after the other, and return rank 0's logs. The
    processes are copies of one that has imported everything. :func:`run` starts them as users
    do.

    Args:
        world_size: number of processes.
        folder: for logs.
        jobs: name -> arguments of fairseq-train.
        before: ``module:function`` that each rank calls first.

    Raises:
        AssertionError: a rank failed, with what each rank wrote to standard error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    starter = start_starter()
    print(json.dumps([world_size, str(folder), before]), file=starter.stdin, flush=True)
    if not json.loads(starter.stdout.readline()):
        errors = [path.read_text()[-4000:] for path in sorted(folder.glob("*.err"))]
        raise AssertionError("\n\nNext rank:\n".join(errors))
    return {name: (folder / f"{name}.0.log").read_text() for name in jobs}


@functools.cache
def start_starter() -> Any:
    """Start the process that copies itself for each rank. It ends with this process."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", HERE / "ranks.py"],
        **{"env": ENVIRONMENT, "text": True},
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
    )


def logged(log: str) -> dict[int, Any]:
    """Return update -> values that training logged."""
    keys = ("loss", "gnorm", "lr", "wpb", "load_entropy")
    return {
        int(record["num_updates"]): {key: record.get(key) for key in keys}
        for record in commands.records(log)
    }


def final_state(save_dir: Path) -> dict[str, Any]:
    """Return what a training has saved, with all shards."""
    state = torch.load(save_dir / "checkpoint_last.pt", weights_only=True)
    parts = sorted(save_dir.glob(f"{state['sffn'].get('folder', '-')}/*.pt"))
    tensors = [torch.load(path, weights_only=True) for path in parts]
    return {
        "model": state["model"],
        "optimizer": state["last_optimizer_state"],
        "parts": [{key: part[key] for key in ("model", "optimizer")} for part in tensors],
        "updates": state["optimizer_history"][-1]["num_updates"],
    }


def run_jobs(jobs: Path) -> NoReturn:
    """Run the trainings of a JSON file of {name: arguments}. Logs go to NAME.RANK.log beside it.

    A rank whose job hangs prints the stacks of its threads and ends.
    """
    for name, arguments in json.loads(jobs.read_text()).items():
        faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True)
        log = commands.run("train", *arguments)
        (jobs.parent / f"{name}.{os.environ['RANK']}.log").write_text(log)
    commands.leave()
