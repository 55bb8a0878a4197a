"""Two hosts: network namespaces of this machine, joined by a cable.

A shell has a mount namespace of its own, so that its network namespaces have the names of the
documents and no other program sees them. When the shell ends, also because the test process was
killed, it kills every process in its namespaces. The kernel then removes them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = (HERE.parents[2] / "fairseq_sffn" / "expert_parallel" / "README.md").read_text()
CABLE = "".join(
    line.removeprefix("    ") + "\n"
    for line in PAGE.splitlines()
    if line.startswith(("    ip netns add ", "    ip link add ", "    ip -n host"))
)
"""The commands of the documents that make the two hosts."""
KEEPER = """\
set -e
mkdir -p /run/netns
mount -t tmpfs netns /run/netns
trap 'for host in $(ls /run/netns); do ip netns pids $host | xargs -r kill -9; done' EXIT
"""


def reason_to_skip() -> str | None:
    """Return in words why this machine cannot have the two hosts; ``None``: it can."""
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"two hosts: there is no program `{program}` (Debian: iproute2, util-linux)"
    if os.geteuid():
        return "two hosts: only root may make network namespaces"
    attempt = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", f"{KEEPER}{CABLE}"],
        **{"capture_output": True, "text": True, "stdin": subprocess.DEVNULL},
    )
    if attempt.returncode:
        said = attempt.stderr.strip().splitlines() or ["no reason given"]
        return f"two hosts: network namespaces may not be made here: {said[-1]}"
    return None


class Host:
    """A host, which runs Python programs.

    Args:
        name: name of its network namespace.
        address: its address.
        keeper: process id of the shell that has the namespace.
    """

    def __init__(self, name: str, address: str, keeper: int) -> None:
        self.name, self.address = name, address
        self.namespace = Path(f"/proc/{keeper}/root/run/netns/{name}")

    def start(
        self, log: Path, *words: Any, binds: dict[str, str] | None = None, **variables: str
    ) -> subprocess.Popen[str]:
        """Start a Python program on this host.

        Args:
            log: file for what it prints.
            words: words after ``python``.
            binds: folder -> folder that this host has in its place.
            variables: further environment variables.
        """
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "HOST_NAMESPACE": str(self.namespace),
            "HOST_BINDS": os.pathsep.join(f"{a}={b}" for a, b in (binds or {}).items()),
            **variables,
        }
        with open(log, "w") as output:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", str(HERE / "on_host.py"), *map(str, words)],
                **{"env": environment, "text": True, "stdin": subprocess.DEVNULL},
                **{"stdout": output, "stderr": subprocess.STDOUT},
            )

    def torchrun(
        self,
        log: Path,
        meeting: Host | None,
        *words: Any,
        flags: tuple[str, ...] = (),
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start two processes on this host.

        Args:
            log: file for what they print.
            meeting: the host on which the launchers meet; ``None``: ``flags`` say where.
            words: a program and its arguments.
            flags: further flags of torchrun.
            options: see :meth:`start`.
        """
        return self.start(
            log,
            *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"),
            *("--local_addr", self.address, "--rdzv_backend", "c10d", "--rdzv_id", "job"),
            *("--rdzv_conf", f"is_host={str(self is meeting).lower()},{RENDEZVOUS}"),
            *(("--rdzv_endpoint", f"{meeting.address}:29500") if meeting else ()),
            *(*flags, HERE / "on_host.py", *words),
            **options,
        )

    def processes(self) -> list[int]:
        """Return the ids of the processes on this host."""
        mine, found = os.stat(self.namespace).st_ino, []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.stat(process / "ns" / "net").st_ino == mine:
                    found.append(int(process.name))
        return found

    def kill(self) -> None:
        """Kill all processes on this host."""
        for number in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, 9)

    def pull_cable(self) -> None:
        """Take this host's interface down."""
        self.run("ip link set eth0 down")

    def run(self, command: str) -> None:
        """Run a command of the shell in this host's network."""
        words = ("nsenter", f"--net={self.namespace}", "sh", "-c", command)
        subprocess.run(words, check=True)


RENDEZVOUS = "last_call_timeout=2,keep_alive_interval=1"
"""So that torchrun soon goes on with the hosts that are left."""


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Return a context with two hosts, without any process."""
    with subprocess.Popen(
        ["unshare", "--net", "--mount", "sh"],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
    ) as keeper:
        print(KEEPER, CABLE, "echo ready", sep="\n", file=keeper.stdin, flush=True)
        assert keeper.stdout.readline() == "ready\n"
        hosts = [Host(f"host{n}", f"10.0.0.{n}", keeper.pid) for n in (1, 2)]
        yield hosts
        for host in hosts:
            host.kill()


def sent_bytes() -> int:
    """Return the bytes that have left the host of this process by its cable, headers included."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counts = line.strip().partition(":")
        if name == "eth0":
            return int(counts.split()[8])
    raise AssertionError("there is no eth0")
