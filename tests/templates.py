"""Starts Python programs from a template: a process that has imported PyTorch and fairseq.

A program starts as a copy of the template, in a tenth of a second instead of three seconds.

A template only imports and copies itself. It has one thread, none of the project's code, and the
state of a new process. The fixture ``quick_start`` makes ``subprocess`` start programs with
:meth:`Template.start`. A copy is a child of the process that asked, with the files, environment and
folder that ``subprocess`` gives it. It has its own template for the programs that it starts.
Programs that are not Python's start as usual.

A copy differs from a new process in the effects of imports. Environment variables that PyTorch
reads when it is imported have no effect. A script finds logging set up to standard error, as
importing ``fairseq`` does. Tests of a start, of imports or of console scripts need real processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LIBC = ctypes.CDLL(None)
PR_SET_CHILD_SUBREAPER = 36
SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}
ABOVE = 512
"""The files of a program have numbers below this one."""
ROOM = "." * 32768
"""Argument of the template that makes room for the command lines of its copies."""


class Program(NamedTuple):
    """The program that a copy runs.

    Args:
        arguments: words after ``python``.
        environment: environment variables.
        folder: working directory.
        files: numbers of the program's files.
        session: whether it begins a session.
        group: process group to join; 0: a new group; -1: the template's group.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    files: list[int]
    session: bool
    group: int


class Template:
    """A template process, as seen by the process that uses it.

    Each of the two processes has one end of a socket. The template ends when the socket is closed,
    and therefore with the process that uses it.

    Args:
        requests: the user's end of the socket.
    """

    def __init__(self, requests: socket.socket) -> None:
        self.requests, self.lock = requests, threading.Lock()
        self.ordinary = subprocess._fork_exec

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Make ``subprocess`` start programs from the template."""
        subprocess._fork_exec = self.start
        try:
            yield
        finally:
            subprocess._fork_exec = self.ordinary

    def start(self, *given: Any) -> int:
        """Replace ``_posixsubprocess.fork_exec``, and like it return the child's number."""
        args, _, close, files, cwd, env, stdin, _, _, stdout, _, stderr, _, errors, *rest = given
        words = [os.fsdecode(word) for word in args]
        _, session, group, *_, before, _ = rest
        variables = dict(os.fsdecode(variable).split("=", 1) for variable in env or ())
        if env is None:
            variables = dict(os.environ)
        preloads = variables.get("LD_PRELOAD") != os.environ.get("LD_PRELOAD")
        if not close or before or preloads or not can_start(words):
            return self.ordinary(*given)
        sources = {number: number for number in files if number != errors}
        for number, source in enumerate((stdin, stdout, stderr)):
            sources[number] = number if source == -1 else source
        folder = os.fsdecode(cwd or os.getcwd())
        program = Program(words[1:], variables, folder, [*sources], session, group)
        with self.lock:
            # An orphaned descendant becomes a child of this process.
            LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self.requests, [json.dumps(program).encode()], [*sources.values()])
                return int(self.requests.recv(64))
            finally:
                LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def can_start(words: Sequence[str]) -> bool:
    """Return whether a command line runs a Python module, text or file."""
    if words[0] != sys.executable:
        return False
    _, rest = split_options(words[1:])
    return bool(rest) and (rest[0] in ("-m", "-c") or rest[0].endswith(".py"))


def split_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the options of ``python`` about warnings and buffers from the rest."""
    left, options = [*words], []
    while left and left[0] in ("-W", "-u"):
        options += [left.pop(0)] if left[0] == "-u" else [left.pop(0) + left.pop(0)]
    return options, left


@contextlib.contextmanager
def begin() -> Iterator[Template]:
    """Start a template that lasts until the end of the context. All programs that it started end
    too."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # The system shows this variable for all copies, whatever their environment is.
    mark = f"TEMPLATE_OF={os.getpid()}"
    with (
        ours,
        subprocess.Popen(
            [sys.executable, __file__, str(its.fileno()), ROOM],
            pass_fds=[its.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1", **dict([mark.split("=")])},
        ),
    ):
        its.close()
        try:
            yield Template(ours)
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            kill_all(mark)


def kill_all(mark: str) -> None:
    """Kill the processes that started with a variable in their environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if mark.encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def main() -> None:
    """Run the template."""
    show, warnings.showwarning = warnings.showwarning, lambda *_, **__: None
    import fairseq  # noqa: F401

    handlers = logging.root.handlers[:]  # importing fairseq leaves these handlers
    import fairseq_cli.generate
    import fairseq_cli.hydra_train
    import fairseq_cli.interactive
    import fairseq_cli.preprocess
    import fairseq_cli.train  # noqa: F401
    import torch._dynamo
    import torch.distributed.run
    import torch.utils.flop_counter  # noqa: F401

    warnings.showwarning = show
    # These modules set up logging when they are first imported.
    for name in [name for name in sys.modules if name.startswith("fairseq_cli")]:
        del sys.modules[name]
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    run(*serve(socket.socket(fileno=int(sys.argv[1]))), handlers)


def serve(requests: socket.socket) -> tuple[Program, list[int], Template]:
    """Copy this process for each request.

    Returns:
        In a copy: its program, its files, and its template.
    """
    while True:
        try:
            message, files, *_ = socket.recv_fds(requests, 1 << 20, 200)
        except ConnectionError:
            message = b""
        if not message:  # the process that asks has ended
            os._exit(0)
        read, write = os.pipe()
        middle = os.fork()
        if not middle:
            middle = os.getpid()
            if child := os.fork():
                os.write(write, b"%d" % child)
                os._exit(0)  # its child becomes a child of the process that asks
            while os.getppid() == middle:
                time.sleep(0.001)
            ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            if os.fork():
                return Program(*json.loads(message)), files, Template(ours)
            for number in (*files, read, write, ours.detach(), requests.detach()):
                os.close(number)
            requests = its
            continue
        os.waitpid(middle, 0)
        with contextlib.suppress(ConnectionError):
            requests.send(os.read(read, 64))
        for number in (*files, read, write):
            os.close(number)


def run(
    program: Program, files: list[int], template: Template, handlers: list[logging.Handler]
) -> None:
    """Run a program as a new process would. Python then ends this process as usual."""
    import numpy as np
    import torch

    kept = template.requests.fileno()
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, ABOVE) for number in files]
    for number in map(int, os.listdir("/proc/self/fd")):
        if number != kept and number not in high:
            with contextlib.suppress(OSError):
                os.close(number)
    for number, source in zip(program.files, high, strict=True):
        os.dup2(source, number)
        os.close(source)
    if program.session:
        os.setsid()
    elif program.group != -1:
        os.setpgid(0, program.group)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    old_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(program.environment)
    os.chdir(program.folder)
    subprocess._fork_exec = template.start
    np.random.seed()
    threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    torch.set_num_threads(int(threads))

    show_command_line([sys.executable, *program.arguments])
    options, words = split_options(program.arguments)
    if "-u" in options:
        sys.stdout.reconfigure(line_buffering=True)
    by_environment = filter(None, os.environ.get("PYTHONWARNINGS", "").split(","))
    sys.warnoptions[:] = [*by_environment, *(word[2:] for word in options if word != "-u")]
    warnings._processoptions(sys.warnoptions)
    kind = words.pop(0) if words[0] in ("-m", "-c") else ""
    # These programs set up logging before they import fairseq.
    first = kind == "-c" or (kind == "-m" and words[0].startswith("fairseq_cli"))
    logging.root.handlers[:] = [] if first else handlers
    sys.argv = ["-c", *words[1:]] if kind == "-c" else words
    sys.path[0] = {"-m": os.getcwd(), "-c": ""}.get(
        kind, os.path.dirname(os.path.abspath(words[0]))
    )
    path = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[1:] = [*path, *(folder for folder in sys.path[1:] if folder not in old_path)]
    if kind == "-m":
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(words[0], {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")


def show_command_line(words: Sequence[str]) -> None:
    """Make the system show a command line as this process's, if there is room for it."""
    with open("/proc/self/stat") as stat:
        begin, end = map(int, stat.read().rpartition(")")[2].split()[45:47])
    line = b"".join(os.fsencode(word) + b"\0" for word in words)
    ctypes.memmove(begin, line[: end - begin].ljust(end - begin, b"\0"), end - begin)


if __name__ == "__main__":
    main()
