"""Signs of life of the processes of a training.

A collective operation waits half an hour for a process that has vanished with its host, and its
error does not say which process that is. Each process therefore writes a number to the store in
which the processes met, every two seconds. Rank 0 reads the numbers of all processes, and writes
which process is lost. The other processes read that, and the number of rank 0.

The store is on rank 0's host. A process that cannot reach the store counts that host as lost.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils

from ..errors import UsageError
from ..options.waiting import peer_timeout
from ..ranks import agreed, gathered

BEAT_SECONDS = 2.0
"""Longest time between two signs of life."""
MISSED_BEATS = 5
"""Signs of life that a process misses until it is lost, if a connection has broken."""


class Place(NamedTuple):
    """Where a rank runs.

    Attributes:
        rank: the rank.
        host: name of its host.
        address: address of the host for the other ranks; empty: it is not known.
    """

    rank: int
    host: str
    address: str

    @property
    def shown(self) -> str:
        """The host in words."""
        return f"host {self.host}" + (f" ({self.address})" if self.address else "")


def own_place() -> Place:
    """Return where this process runs."""
    return Place(dist.get_rank(), socket.gethostname(), own_address())


def own_address() -> str:
    """Return the address from which this process reaches the address where the ranks met."""
    try:
        port = int(os.environ["MASTER_PORT"])
        found = socket.getaddrinfo(os.environ["MASTER_ADDR"], port, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as unsent:
            unsent.connect(address)  # sends nothing
            return str(unsent.getsockname()[0])
    except (KeyError, ValueError, OSError):
        return ""


def lost_ranks(ranks: Iterable[int], places: Sequence[Place]) -> str:
    """Return in words the hosts that are lost, or their ranks if a part of a host is lost."""
    ranks = set(ranks)
    parts = []
    for host in dict.fromkeys(places[rank][1:] for rank in sorted(ranks)):
        there = [place for place in places if place[1:] == host]
        lost = [place.rank for place in there if place.rank in ranks]
        numbers = f"rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}"
        whole = len(lost) == len(there) < len(places)
        parts.append(
            f"{there[0].shown} with {numbers}" if whole else f"{numbers} on {there[0].shown}"
        )
    return " and ".join(parts)


def store_of_ranks() -> dist.Store | None:
    """Return a connection of its own to the store where the ranks met; ``None``: it is a file."""
    store: Any = dist.distributed_c10d._get_default_store()
    inner = store
    while isinstance(inner, dist.PrefixStore):
        inner = inner.underlying_store
    return store.clone() if isinstance(inner, dist.TCPStore) else None


class PeerWatch:
    """Watches the other processes of a training. All ranks make it together.

    It ends this process, with one line, if another process is lost or has failed.

    Args:
        store: a connection to the store where the ranks met.
        seconds: time without a sign of life after which a process is lost.
    """

    def __init__(self, store: dist.Store, seconds: float) -> None:
        self.seconds = seconds
        self._store, self._rank = store, dist.get_rank()
        self._beat_seconds = min(BEAT_SECONDS, seconds / MISSED_BEATS)
        self._ended, self._broken, self._woken = (threading.Event() for _ in range(3))
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._places: list[Place] = gathered(own_place())
        self._key = f"fairseq_sffn/{agreed(secrets.token_hex(4))}/{{}}".format
        store.set(self._key(self._rank), "0")
        if self._rank == 0:
            for name in ("lost", "broken"):
                store.set(self._key(name), "")
        dist.barrier(group=distributed_utils.get_global_group())
        self._answered = time.monotonic()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("signs of life", self._show), ("lost processes", self._watch))
        ]

    def start(self) -> None:
        """Start to watch."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """End, without a message."""
        self._ended.set()
        self._woken.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this rank fails, and why."""
        reason = str(error) if isinstance(error, UsageError) else described(error)
        place = self._places[self._rank]
        line = f"rank {place.rank} on {place.shown} has failed: {reason}"
        try:
            self._store.set(self._key("lost"), line)
        except Exception:  # the store is gone
            return

    def wait(self) -> None:
        """Wait until the lost process is known, after a connection has broken.

        This process then ends. The function returns if no process is lost.
        """
        if threading.current_thread() is threading.main_thread():
            # A launcher that has lost its store ends its processes before they name the host.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._broken.set()
        self._woken.set()
        time.sleep(self._limit + 5 * self._beat_seconds)

    @property
    def _limit(self) -> float:
        """Seconds without a sign of life after which a process is lost."""
        soon = MISSED_BEATS * self._beat_seconds
        return min(self.seconds, soon) if self._broken.is_set() else self.seconds

    def _show(self) -> None:
        """Give signs of life, and look for those of others."""
        count = 0
        while not self._ended.is_set():
            count += 1
            try:
                self._exchange(count)
                self._answered = time.monotonic()
            except Exception:  # otherwise, ``_watch`` sees that there is no answer
                if self._broken.is_set():
                    self._leave(self._line([0], "its connections have closed"))
            self._woken.wait(self._beat_seconds)
            self._woken.clear()

    def _exchange(self, count: int) -> None:
        key, store = self._key, self._store
        store.set(key(self._rank), str(count))
        if self._broken.is_set():
            store.set(key("broken"), "1")
        others = range(1, len(self._places)) if self._rank == 0 else [0]
        names = ("lost", "broken", *others)
        lost, broken, *beats = store.multi_get([key(name) for name in names])
        now = time.monotonic()
        if self._rank == 0 and broken:
            self._broken.set()
        for rank, beat in zip(others, beats, strict=True):
            if rank not in self._beats or self._beats[rank][0] != beat:
                self._beats[rank] = beat, now
        silent = {rank: now - self._beats[rank][1] for rank in others}
        line = lost.decode()
        if not line and max(silent.values()) > self._limit:
            # The other ranks of the same host have vanished a moment later.
            nearly = self._limit - 2 * self._beat_seconds
            line = self._line([rank for rank in others if silent[rank] > nearly])
            if self._rank == 0:
                store.set(key("lost"), line)
        if line:
            self._leave(line)

    def _watch(self) -> None:
        """Notice that the store does not answer."""
        while not self._ended.wait(self._beat_seconds):
            if time.monotonic() - self._answered > self._limit + self._beat_seconds:
                self._leave(self._line([0]))

    def _line(self, ranks: list[int], reason: str = "") -> str:
        """Return the line that names lost ranks."""
        reason = reason or f"no sign of life for {self._limit:g} seconds"
        if ranks == [0]:  # with the store on rank 0's host
            ranks = [place.rank for place in self._places if place[1:] == self._places[0][1:]]
            if self._rank in ranks:
                ranks = [0]
        return f"lost: {lost_ranks(ranks, self._places)}: {reason}"

    def _leave(self, line: str) -> None:
        """End this process, with the line on the first process of the host."""
        if self._ended.is_set():
            return
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, f"{line}\n".encode())  # logging could wait for a lock of the main thread
        else:  # the first process prints the line; a launcher then ends this one
            time.sleep(2 * self._beat_seconds)
        os._exit(1)


def watched(main: Callable[..., Any], cfg: Any, **kwargs: Any) -> Any:
    """Run fairseq's function of a command while its processes watch each other.

    Args:
        main: the function. All ranks call it together.
        cfg, kwargs: its arguments.
    """
    store = store_of_ranks() if is_distributed() and peer_timeout() else None
    if store is None:
        return main(cfg, **kwargs)
    watch = PeerWatch(store, peer_timeout())
    watch.start()
    try:
        result = main(cfg, **kwargs)
        # A rank that waits for the others still gives signs of life.
        dist.barrier(group=distributed_utils.get_global_group())
        return result
    except Exception as error:
        if is_of_a_lost_peer(error):
            watch.wait()
        else:
            watch.fail(error)
        raise
    except UsageError as error:
        if isinstance(error.code, str):  # otherwise another rank has told the reason
            watch.fail(error)
        raise
    finally:
        watch.end()


def watching(main: Callable[..., Any]) -> Callable[..., Any]:
    """Return :func:`watched` for a function."""
    return functools.partial(watched, main)


def is_distributed() -> bool:
    """Return whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_of_a_lost_peer(error: Exception) -> bool:
    """Return whether an error comes from a collective operation whose peer has ended."""
    if not is_distributed():
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def described(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
