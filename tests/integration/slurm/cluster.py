"""A Slurm cluster of two nodes on this machine, from Debian's packages."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("127.0.0.1", "127.0.0.2")
"""Names of the nodes. They are addresses of this machine, which need no entry in ``/etc/hosts``."""
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
ReturnToService=2
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_min_interval=100000,bf_interval=1
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""A requeued job waits until the credential of its first start has expired: here after 5 seconds.
``config_overrides`` lets nodes have more cores than the machine."""
START_SECONDS = 60
"""Time after which the cluster does not start any more."""
STOP_SECONDS = 10
"""Time after which jobs and daemons that do not end are killed."""
HANGS_SECONDS = 400
"""Time after which a job hangs, also on a slow machine."""


def missing() -> list[str]:
    """Return the programs of Slurm that are not installed."""
    return [name for name in PROGRAMS if not find(name)]


def find(program: str) -> str | None:
    """Return the path of a program, which may lie in a folder of the administrator's."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that no other program uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


class Cluster:
    """The cluster. Each node has 64 cores and 8 GPUs in the eyes of Slurm.

    Args:
        folder: empty folder for keys, states and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "slurm.conf"
        self.daemons: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[Cluster]:
        """Start the daemons, and end them and all jobs. The environment names the configuration
        and the folder of torchrun."""
        self.configure()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(self.file))
            patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
            try:
                self.start()
                yield self
            finally:
                self.stop()

    def configure(self) -> None:
        """Write the configuration."""
        controller, *ports = free_ports(1 + len(NODES))
        nodes = (
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=64 "
            "Gres=gpu:8"
            for name, port in zip(NODES, ports, strict=True)
        )
        values = {"folder": self.folder, "controller": controller, "user": getpass.getuser()}
        self.file.write_text(CONFIGURATION.format(**values, nodes="\n".join(nodes)))
        gpus = self.folder / "gpu[0-7]"  # files that are no devices: Slurm only counts them
        (self.folder / "gres.conf").write_text(f"Name=gpu File={gpus}\n")
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)

    def start(self) -> None:
        """Start the daemons, and wait until all nodes are idle."""
        self.folder.chmod(0o755)
        munge = {name: self.folder / f"munge{end}" for name, end in MUNGE_FILES.items()}
        self.daemon("munged", "--foreground", "--force", *(f"--{n}={p}" for n, p in munge.items()))
        self.daemon("slurmctld", "-D", "-c", "-f", self.file)
        for name in NODES:
            self.daemon("slurmd", "-D", "-N", name, "-f", self.file)
        end = time.monotonic() + START_SECONDS
        while not self.is_idle():
            if time.monotonic() > end:
                raise AssertionError("".join(map(text, sorted(self.folder.glob("*.log")))))
            time.sleep(0.1)

    def daemon(self, program: str, *words: object) -> None:
        """Start a daemon as a child of this process."""
        with (self.folder / f"{program}.out").open("a") as out:
            command = [find(program) or program, *map(str, words)]
            self.daemons.append(subprocess.Popen(command, stdout=out, stderr=out))

    def is_idle(self) -> bool:
        """Return whether all nodes are up, and no job runs."""
        try:
            return call("sinfo", "--noheader", "--format", "%T %D") == f"idle {len(NODES)}"
        except AssertionError:  # the controller does not listen yet
            return False

    def stop(self) -> None:
        """End all jobs and the daemons."""
        with contextlib.suppress(AssertionError):
            call("scancel", "--user", getpass.getuser())
            call("scancel", "--user", getpass.getuser(), "--signal", "KILL", "--full")
            end = time.monotonic() + STOP_SECONDS
            while not self.is_idle() and time.monotonic() < end:
                time.sleep(0.1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def submit(self, script: str, *flags: str, log: Path) -> str:
        """Submit a batch script, whose output goes to a file, and return the job's number."""
        words = ("sbatch", "--parsable", "--output", log, *flags)
        return call(*words, stdin=script)

    def state(self, job: str) -> str:
        """Return the state of a job, also of one that has ended."""
        shown = call("scontrol", "--oneliner", "show", "job", job)
        found = re.search(r"JobState=(\w+)", shown)
        assert found, shown
        return found[1]

    def wait(self, job: str, log: Path) -> str:
        """Wait until a job has ended, and return its state."""
        self.wait_until(lambda: self.state(job) in ENDED, log)
        return self.state(job)

    def wait_until(self, condition: Callable[[], bool], log: Path) -> None:
        """Wait for a condition. If it does not come true, the error has the end of a log."""
        end = time.monotonic() + HANGS_SECONDS
        while not condition():
            if time.monotonic() > end:
                queue = call("squeue", "--states", "all")
                raise AssertionError(f"{queue}\n{log}: {text(log)}")
            time.sleep(0.3)


MUNGE_FILES = {
    **{"key-file": ".key", "socket": ".sock", "pid-file": ".pid"},
    **{"log-file": ".log", "seed-file": ".seed"},
}
"""Flags of ``munged`` that name files -> ends of the files' names."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
"""States of a job that will not run any more."""


def call(program: str, *words: object, stdin: str = "") -> str:
    """Run a program to its end and return what it prints."""
    command = [find(program) or program, *map(str, words)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def text(file: Path) -> str:
    """Return the end of a log; empty if there is none yet."""
    return file.read_text()[-6000:] if file.exists() else ""
