"""Starts ranks that train, for ``launch.train``: copies of this process.

The process has one thread, and does not train itself. A copy of a process with threads could wait
for ever for a lock that another thread held. The pytest process has threads, and what earlier tests
have left.
"""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

sys.path[:0] = [str(Path(__file__).parents[2])]
import torch._dynamo  # noqa: E402, F401
import torch.distributed as dist  # noqa: E402
from fairseq import options  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402

from tests import conftest  # noqa: E402
from tests.expert_parallel import launch  # noqa: E402

ENDING_SECONDS = 10
"""Time in which ranks end after one has failed. They then say where they were waiting for it."""


class GlooOfOneThread(dist.ProcessGroupGloo):
    """gloo with one thread for each group in place of two.

    Both threads would wait for the next operation at one condition variable. glibc before 2.41 can
    lose a wake-up if several threads wait (its bug 25847). The operation would then never begin,
    and the other ranks would wait for it.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_default_device()]
        options._threads, options._timeout = 1, timeout
        super().__init__(store, rank, size, options)


def main() -> None:
    """Start ranks for each line of standard input: the number of ranks, their folder, and a
    function to call first. Answer with whether all ended well."""
    arguments = launch.training(Path("data"), Path("saved"), "avgk")
    convert_namespace_to_omegaconf(
        options.parse_args_and_arch(options.get_training_parser(), arguments)
    )  # what it keeps saves each rank time
    conftest.pytest_collection_finish()
    for line in sys.stdin:
        world_size, folder, before = json.loads(line)
        print(json.dumps(run_ranks(world_size, Path(folder), before)), flush=True)


def run_ranks(world_size: int, folder: Path, before: str) -> bool:
    """Run the jobs of a folder in so many ranks, and return whether all ended well."""
    for left in (folder / "port", *folder.glob("*.err")):
        left.unlink(missing_ok=True)
    ranks, well, end = set(), True, float("inf")
    for rank in range(world_size):
        if not (pid := os.fork()):
            become_rank(world_size, rank, folder, before)
        ranks.add(pid)
    while ranks:
        for pid in [*ranks]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                ranks.remove(pid)
            if status and well:
                well, end = False, time.monotonic() + ENDING_SECONDS
        if time.monotonic() > end:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.02)
    return well


def become_rank(world_size: int, rank: int, folder: Path, before: str) -> NoReturn:
    """Continue as a rank in a forked process."""
    try:
        with open(folder / f"{rank}.err", "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        os.environ |= {"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        # ``init_process_group`` and ``new_group`` look the class up by this name.
        dist.distributed_c10d.ProcessGroupGloo = GlooOfOneThread
        store = meet(rank, folder / "port")  # noqa: F841  # it ends with its last reference
        if before:
            pkgutil.resolve_name(before)()
        launch.run_jobs(folder / "jobs.json")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def meet(rank: int, file: Path) -> dist.TCPStore | None:
    """Set where the ranks meet, and return rank 0's store. Rank 0 opens a port before it tells the
    others its number, so that no other process can take the port."""
    store = None
    if rank == 0:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        new = file.with_suffix(".new")
        new.write_text(str(store.port))
        new.rename(file)
    while not file.exists():
        time.sleep(0.01)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": file.read_text()}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is there
    return store


if __name__ == "__main__":
    main()
