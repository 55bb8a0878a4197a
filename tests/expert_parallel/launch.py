"""Starts several processes, for the tests of this folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from tests import commands

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SAME_SENTENCES = ("--curriculum", "1000000", "--dropout", "0")
"""fairseq deals consecutive batches to the ranks, so with these flags they share the batch of one
process."""


def torchrun(world_size: int, *command: Any) -> list[str]:
    """Return the command line that starts so many processes."""
    launcher = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone")
    return [*launcher, "--nproc_per_node", str(world_size), *map(str, command)]


def run(world_size: int, *command: Any) -> "subprocess.CompletedProcess[str]":
    """Run so many processes to their end. Collective operations time out after half an hour, which
    tells a job that waits for a dead rank from a slow machine."""
    return subprocess.run(
        torchrun(world_size, *command),
        **{"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 1200},
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


def train(world_size: int, folder: Path, jobs: dict[str, list[str]]) -> dict[str, str]:
    """Run trainings in so many processes, one after the other, and return rank 0's logs. The
    processes are copies of this one, which has imported everything. :func:`run` starts them as
    users do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = {}
    for rank in range(world_size):
        environment = {**place, "WORLD_SIZE": str(world_size), "RANK": str(rank)}
        if not (pid := os.fork()):
            become_rank(folder, {**environment, "LOCAL_RANK": str(rank)})
        ranks[pid] = rank
    while ranks:
        # A test may have other children, so the processes are waited for one by one.
        for pid, rank in list(ranks.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del ranks[pid]
            if status:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
                    os.waitpid(other, 0)
                raise AssertionError((folder / f"{rank}.err").read_text()[-4000:])
        time.sleep(0.02)
    return {name: (folder / f"{name}.0.log").read_text() for name in jobs}


def become_rank(folder: Path, environment: dict[str, str]) -> NoReturn:
    """Continue as a rank in a forked process."""
    try:
        with open(folder / f"{environment['RANK']}.err", "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ.update(environment)
        run_jobs(folder / "jobs.json")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def run_jobs(jobs: Path) -> NoReturn:
    """Run the trainings of a JSON file of {name: arguments}. Logs go to NAME.RANK.log beside it."""
    for name, arguments in json.loads(jobs.read_text()).items():
        log = commands.run("train", *arguments)
        (jobs.parent / f"{name}.{os.environ['RANK']}.log").write_text(log)
    commands.leave()
