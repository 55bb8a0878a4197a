"""Signals that ask a process to stop, received in a thread of their own."""

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
"""What a terminal, a scheduler or a person sends to a process that has to stop."""
REPEAT_SECONDS = 1.0
"""A signal within this time after the first one is a copy of it: ``timeout`` sends it twice."""
LAUNCHED_REPEAT_SECONDS = 10.0
"""Time within which a signal is a copy where a scheduler and a launcher both send it."""
DEFAULT_HANDLERS = (signal.SIG_DFL, signal.default_int_handler)


class SignalReceiver:
    """Context manager that records signals instead of letting them end the process.

    Python runs signal handlers between two bytecodes of the main thread, and that thread may be
    waiting in a collective operation for a process that has gone. A thread therefore reads the
    signals. It ends the process at once where nothing is left to wait for: after a second signal,
    and after a signal when another process of the training has ended.

    A signal that is ignored, or has a handler of the caller's, keeps it. Nothing is recorded
    outside the main thread, where Python cannot set handlers.

    Args:
        peers: ids of the processes that this one cannot do without.
        launched: whether a launcher, such as torchrun, has started this process. It sends signals
            of its own when a scheduler has sent them to everybody, or when a process has ended.

    Attributes:
        received: number of the first signal, or 0.
        leaving: whether this process and its peers are ending in order.
    """

    def __init__(self, peers: Iterable[int] = (), launched: bool = False) -> None:
        self.received = 0
        self.leaving = False
        self._peers, self._launched = peers, launched
        self._first_time = 0.0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> SignalReceiver:
        if threading.current_thread() is not threading.main_thread():
            return self
        # A launcher forwards only signals that are meant, also where a shell has it ignore them.
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
            # Python writes the number to the socket, whatever the handler does.
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
        """Read signals, and watch the peers, until a zero is read."""
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
                if self.received and peer_ended and not self.leaving:
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
    """Open processes, so that their end can be waited for.

    Returns:
        File descriptors, none where the system has no such descriptors; and whether a process has
        ended already.
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
    """End the process, whatever its other threads do, with the exit status of a signal."""
    line = f"{signal.Signals(number).name}: {reason}; ends without saving\n"
    # Logging could wait for a lock that the main thread holds.
    os.write(2, line.encode())
    os._exit(128 + number)


def survive_signals_of_others(worker: int) -> None:
    """Let a process that loads data ignore signals, except its parent's SIGTERM.

    Launchers and terminals send signals to whole groups of processes. The parent needs batches
    until it has finished an update, and then ends the process itself.

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
