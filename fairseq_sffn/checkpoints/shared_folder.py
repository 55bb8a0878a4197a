"""Files of other hosts: a network file system may show them late, or a folder may not be shared.

A rank waits ``--peer-timeout`` seconds for a file that another rank sees. Then the training ends
with one line that names the file.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils

from ..errors import UsageError
from ..options.waiting import peer_timeout
from ..ranks import agreed, gathered, rank, world_size

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
"""Time between two looks for a file."""
WARN_SECONDS = 5.0
"""Time to wait for a file that is not needed, before a warning."""


def sizes_of(paths: Iterable[Path]) -> dict[str, int]:
    """Return path -> bytes of the files that exist."""
    sizes = {}
    for path in paths:
        try:
            sizes[str(path)] = path.stat().st_size
        except OSError:
            continue
    return sizes


def largest(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return path -> the largest of the sizes that ranks see. A copy grows until it is whole."""
    result: dict[str, int] = {}
    for seen in sizes:
        for path, size in seen.items():
            result[path] = max(size, result.get(path, 0))
    return result


def wait_for(sizes: Mapping[str, int], seconds: float) -> str | None:
    """Wait until this rank sees files.

    Args:
        sizes: path -> bytes of the whole file.
        seconds: the longest time to wait.

    Returns:
        The first file that is not whole; ``None``: all are.
    """
    end = time.monotonic() + seconds
    for path, size in sizes.items():
        while sizes_of([Path(path)]).get(path, -1) < size:
            if time.monotonic() >= end:
                return path
            with suppress(OSError):
                os.listdir(Path(path).parent)  # makes a network file system look again
            time.sleep(LOOK_SECONDS)
    return None


def see_together(paths: Iterable[Path], who: Iterable[int] | None = None) -> None:
    """Wait until all ranks see the files that one of them sees. All ranks call it together.

    Args:
        paths: the files, which may differ between ranks.
        who: the ranks that need the files; ``None``: all ranks.

    Raises:
        UsageError: on every rank, if a rank does not see a file in time.
    """
    if world_size() == 1:
        return
    sizes = gathered(sizes_of(paths))
    needed = who is None or rank() in who
    missing = wait_for(largest(sizes), peer_timeout()) if needed else None
    for number, (path, host) in enumerate(gathered((missing, socket.gethostname()))):
        if path is not None:
            other = max(range(world_size()), key=lambda one: sizes[one].get(path, -1))
            refuse_together(not_seen(path, number, host, other))


def not_seen(path: str | Path, number: int, host: str, other: int) -> str:
    """Return in words that a rank does not see a file.

    Args:
        path: the file.
        number, host: the rank, and its host.
        other: the rank that sees the file.
    """
    return (
        f"{path}: rank {number} on host {host} does not see the file that rank {other} sees, after "
        f"{peer_timeout():g} seconds; checkpoints need a --save-dir that all hosts share "
        "(--peer-timeout waits longer)"
    )


def refuse_together(problem: str) -> None:
    """End the training on every rank, with a line of the first process of each host.

    Raises:
        UsageError: always.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(problem, file=sys.stderr, flush=True)
    if world_size() > 1:  # a launcher ends all processes as soon as one has ended
        dist.barrier(group=distributed_utils.get_global_group())
    raise UsageError(1)


def check_shared(save_dir: Path, needed: bool) -> None:
    """Check that all ranks see the files that rank 0 writes. All ranks call it together.

    Args:
        save_dir: folder of the checkpoints.
        needed: whether several ranks write and read the checkpoints. Otherwise the function only
            warns.

    Raises:
        UsageError: on every rank, if the ranks need a shared folder and do not have one.
    """
    if world_size() == 1 or len(set(gathered(host_of_ranks()))) == 1:
        return
    probe = Path(agreed(str(save_dir / f".seen-by-all-hosts-{secrets.token_hex(4)}")))
    try:
        if rank() == 0:
            write_probe(probe)
        seconds = peer_timeout() if needed else min(WARN_SECONDS, peer_timeout())
        missing = wait_for({str(probe): 1}, seconds)
        answers = gathered((missing, socket.gethostname()))
    finally:
        if rank() == 0:
            probe.unlink(missing_ok=True)
    for number, (path, host) in enumerate(answers):
        if path is None:
            continue
        if needed:
            refuse_together(
                f"--save-dir {save_dir}: rank {number} on host {host} does not see what rank 0 on "
                f"host {answers[0][1]} writes there, after {seconds:g} seconds; with sharded "
                "blocks, all hosts must share the folder (--peer-timeout waits longer)"
            )
        if rank() == 0:
            logger.warning(
                f"--save-dir {save_dir}: only host {answers[0][1]} has the checkpoints, and host "
                f"{host} does not see them: the training resumes only if rank 0 is on the same host"
            )
        return


def write_probe(path: Path) -> None:
    """Write the file for which all ranks look.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        path.write_text("Rank 0 writes this file and removes it. All ranks look for it.\n")
    except OSError as error:
        line = f"--save-dir {path.parent}: cannot be written to: {error.strerror}"
        raise UsageError(line) from error


def host_of_ranks() -> str:
    """Return an identifier of this host, or of the container in which this process sees files."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{boot.strip()} {os.readlink('/proc/self/ns/mnt')}"
    except OSError:  # not Linux
        return socket.gethostname()
