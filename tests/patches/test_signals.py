"""Signals are recorded, or end a process at once, whatever its main thread does."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fairseq_sffn.patches import signals
from fairseq_sffn.patches.signals import SignalReceiver

ROOT = Path(__file__).parents[2]
BEGIN = """
import ctypes, importlib.util, os, signal, subprocess, threading, time

# Without fairseq, which takes seconds.
spec = importlib.util.spec_from_file_location("signals", "fairseq_sffn/patches/signals.py")
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)

def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)

def later(action, seconds=1.2):
    threading.Timer(seconds, action).start()

def block():
    # Like a collective operation, a locked mutex lets no handler of Python's run.
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

peer = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
"""


def run(script: str) -> "subprocess.CompletedProcess[str]":
    """Run a script that has a peer, and return how it ended."""
    return subprocess.run(
        [sys.executable, "-c", BEGIN + textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,  # in case the script hangs
    )


@pytest.mark.parametrize(
    "order", ["send(); later(peer.kill)", "peer.kill(); later(send)", "peer.kill(); send()"]
)
def test_ends_when_a_peer_has_ended(order: str) -> None:
    done = run(f"""
        with signals.SignalReceiver([peer.pid], launched=True):
            {order}
            block()
    """)
    assert done.returncode == 128 + signal.SIGTERM
    said = "SIGTERM: another process of the training has ended; ends without saving\n"
    assert done.stderr == said


def test_ends_when_a_peer_had_ended_before() -> None:
    done = run("""
        peer.kill()
        peer.wait()
        with signals.SignalReceiver([peer.pid]):
            send()
            block()
    """)
    assert done.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_ends_at_the_second_signal(number: signal.Signals) -> None:
    done = run(f"""
        with signals.SignalReceiver([peer.pid]):
            send({int(number)})
            later(lambda: send({int(number)}))
            block()
    """)
    assert done.returncode == 128 + number
    assert done.stderr == f"{number.name}: this is the second signal; ends without saving\n"


@pytest.mark.parametrize(
    ("script", "launched"),
    [
        ("send(); send()", False),  # a copy of the first signal
        ("send(); time.sleep(1.2); send(); time.sleep(1.2); send(signal.SIGINT)", True),
        ("peer.kill(); peer.wait(); time.sleep(0.5)", True),  # no reason to end by itself
        ("receiver.leaving = True; peer.kill(); peer.wait(); send()", True),
        ("signal.raise_signal(signal.SIGCHLD); send()", False),
    ],
)
def test_goes_on(script: str, launched: bool) -> None:
    done = run(f"""
        with signals.SignalReceiver([peer.pid], launched={launched}) as receiver:
            {script}
            time.sleep(0.5)
        print("received", int(receiver.received))
    """)
    assert done.returncode == 0, done.stderr
    received = int(signal.SIGTERM) if "send" in script else 0
    assert done.stdout == f"received {received}\n"


@pytest.mark.parametrize("launched", [False, True])
def test_ignored_signals_are_received_from_a_launcher_alone(launched: bool) -> None:
    """A shell makes background processes ignore SIGINT, and so do torchrun's workers."""
    done = run(f"""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with signals.SignalReceiver(launched={launched}) as receiver:
            send(signal.SIGINT)
            time.sleep(0.5)
        print(int(receiver.received), signal.getsignal(signal.SIGINT) == signal.SIG_IGN)
    """)
    assert done.stdout == f"{int(signal.SIGINT) * launched} True\n"


@pytest.mark.parametrize("launched", [False, True])
def test_a_launcher_does_not_end_what_is_leaving(launched: bool) -> None:
    """torchrun ends all other processes as soon as one process has ended."""
    done = run(f"""
        with signals.SignalReceiver(launched={launched}) as receiver:
            receiver.leaving = True
        send()
        print("left")
    """)
    assert done.returncode == (0 if launched else -signal.SIGTERM)


def test_leaves_handlers_as_they_were() -> None:
    def own(*_: object) -> None:
        pass

    numbers = signals.STOPPING
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGUSR1, own)
    try:
        with SignalReceiver():
            assert signal.getsignal(signal.SIGUSR1) == own
            assert signal.getsignal(signal.SIGTERM) != before[1]
        assert signal.getsignal(signal.SIGUSR1) == own
    finally:
        signal.signal(signal.SIGUSR1, before[2])
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


def load_data(ready: "multiprocessing.synchronize.Event") -> None:
    signals.survive_signals_of_others(0)
    ready.set()
    time.sleep(600)


def test_a_process_that_loads_data_obeys_its_parent_alone() -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=load_data, args=(ready,))
    worker.start()
    ready.wait()
    for name in ("INT", "USR1", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join()
    assert worker.exitcode == 0
