"""Signals that ask a process to stop, received in a separate thread."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterable
from multiprocessing.connection import wait
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals by which a terminal, a scheduler or a person asks a process to stop."""
REPEAT_SECONDS = 1.0
"""Time after the first signal in which signals are copies of it: ``timeout`` sends two."""
LAUNCHED_REPEAT_SECONDS = 10.0
"""The same time under a launcher: the scheduler and the launcher both send the signal."""
DEFAULT_HANDLERS = (signal.SIG_DFL, signal.default_int_handler)


class SignalReceiver:
    """Context manager that records signals instead of letting them end the process.

    Python runs signal handlers between two bytecodes of the main thread. But the main thread may
    wait in a collective operation for a process that has ended. Another thread therefore reads the
    signals. It ends the process at once after a second signal, or if another process of the
    training has ended after a signal.

    Ignored signals stay ignored, and handlers of the caller stay. Outside of the main thread,
    Python cannot set handlers, and nothing is recorded.

    Args:
        peers: ids of the processes without which this process cannot go on.
        launched: whether a launcher, such as torchrun, has started this process. A launcher sends
            its own signals when a scheduler signals all processes, or when a process has ended.

    Attributes:
        received: number of the first signal, or 0.
        leaving: whether this process and its peers are ending in order.
        ending: held by the thread that ends this process, so that one of them says why.
    """

    def __init__(self, peers: Iterable[int] = (), launched: bool = False) -> None:
        self.received = 0
        self.leaving = False
        self.ending = threading.Lock()
        self._peers, self._launched = peers, launched
        self._first_time = 0.0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> SignalReceiver:
        if threading.current_thread() is not threading.main_thread():
            return self
        # Also replace ignored handlers under a launcher: a shell may have set them, and the
        # launcher forwards only signals that are meant for its processes.
        replaced = (*DEFAULT_HANDLERS, *([signal.SIG_IGN] if self._launched else []))
        self._handlers = {
            number: handler
            for number in STOPPING
            if (handler := signal.getsignal(number)) in replaced
        }
        if not self._handlers:
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in self._handlers:
            # Python writes the number to the socket before the handler runs.
            signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            ignored = self.leaving and self._launched
            signal.signal(number, signal.SIG_IGN if ignored else handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._writer.send(b"\0")
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _watch(self) -> None:
        """Read signals and watch the peers until a zero is read."""
        peers, peer_ended = open_processes(self._peers)
        waiting: list[Any] = [self._reader, *peers]
        try:
            while True:
                for ready in wait(waiting):
                    if ready is not self._reader:
                        peer_ended = True
                        waiting.remove(ready)
                        continue
                    for number in self._reader.recv(4096):
                        if number == 0:
                            return
                        if number in self._handlers:
                            self._receive(number)
                lost = self.received and peer_ended and not self.leaving
                if lost and self.ending.acquire(blocking=False):
                    end_at_once(self.received, "another process of the training has ended")
        finally:
            for descriptor in peers:
                os.close(descriptor)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        repeat_seconds = LAUNCHED_REPEAT_SECONDS if self._launched else REPEAT_SECONDS
        if not self.received:
            self.received, self._first_time = number, now
        elif now - self._first_time > repeat_seconds:
            end_at_once(number, "this is the second signal")


def open_processes(ids: Iterable[int]) -> tuple[list[int], bool]:
    """Open file descriptors of processes, which become readable when the processes end.

    Returns:
        The descriptors, none if the system does not support them; and whether a process has already
        ended.
    """
    descriptors: list[int] = []
    ended = False
    for number in ids if hasattr(os, "pidfd_open") else ():
        try:
            descriptors.append(os.pidfd_open(number))
        except ProcessLookupError:
            ended = True
        except OSError:  # an old kernel, or a container that forbids it
            continue
    return descriptors, ended


def end_at_once(number: int, reason: str) -> None:
    """End the process at once with the exit status of a signal, whatever other threads do."""
    line = f"{signal.Signals(number).name}: {reason}; ends without saving\n"
    # Logging could wait for a lock that the main thread holds.
    os.write(2, line.encode())
    os._exit(128 + number)


def survive_signals_of_others(worker: int) -> None:
    """Make a data-loading process ignore signals, except its parent's SIGTERM.

    Launchers and terminals send signals to whole process groups. The parent needs batches until it
    has finished its update. Then it ends the process itself.

    Args:
        worker: number of the process, which a ``DataLoader`` passes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
