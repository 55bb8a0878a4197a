"""Trains and evaluates several runs at a time."""

import contextlib
import fcntl
import itertools
import os
import signal
import subprocess
import threading
import traceback
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fairseq_sffn.errors import UsageError

from .plan import Run
from .processes import cores
from .progress import Progress, summary
from .results import is_done
from .slurm import own_job
from .training import Training, last_section


@dataclass
class Runner(Training):
    """Trains and evaluates several runs at a time."""

    goes_on: ClassVar[str] = "the same command resumes the runs"
    """What happens to the runs when this command is stopped, in words."""

    jobs: int  # number of runs at a time
    children: set[subprocess.Popen[str]] = field(default_factory=set, init=False)
    active: set[Run] = field(default_factory=set, init=False)  # runs that are being trained
    locks: dict[Path, int] = field(default_factory=dict, init=False)
    stopping: threading.Event = field(default_factory=threading.Event, init=False)

    def run(self, runs: Sequence[Run], sweep: bool, zero_shot: Container[Run] = ()) -> None:
        """Finish all runs. A run that fails does not stop the others; the error comes at the end.

        Args:
            runs: runs without results.
            sweep: evaluate on the validation split only, and keep no model.
            zero_shot: the runs that are evaluated on zero-shot tasks.
        """
        failures = []
        progress = Progress(runs, self.scale, self.work)
        with progress, ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self.finish, run, sweep, run in zero_shot): run for run in runs}
            waiting = set(futures)
            try:
                while waiting:
                    ended, waiting = wait(waiting, progress.interval, return_when=FIRST_COMPLETED)
                    for future in ended:
                        failure = failure_of(future)
                        failures += [failure] if failure else []
                        progress.say(futures[future], failure)
                    finished = {futures[future] for future in futures.keys() - waiting}
                    progress.show(finished, self.active)
            except BaseException:
                self.stop(futures)
                raise
        if failures:
            raise UsageError(summary(failures, runs))

    def stop(self, futures: Iterable[Future[None]]) -> None:
        """Ask all processes to end, and wait. Training processes finish an update and save; at a
        further signal to this process they end at once."""
        self.stopping.set()
        for future in futures:
            future.cancel()
        while True:
            for child in list(self.children):
                end(child)
            with contextlib.suppress(KeyboardInterrupt):
                wait(futures)
                return

    def finish(self, run: Run, sweep: bool, zero_shot: bool) -> None:
        """Start or resume a run, evaluate it and store its result."""
        section = last_section(sweep, zero_shot)
        with self.locked(self.folder(run)):
            self.results.refresh(run)
            if not is_done(self.results.get(run) or {}, section):
                self.active.add(run)
                try:
                    self.train_and_evaluate(run, sweep, zero_shot)
                finally:
                    self.active.discard(run)

    @contextlib.contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Wait until no other command works on the run of a folder, and keep others from it."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("a") as file:
            for tries in itertools.count():
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if not tries:
                    print(f"{folder.name}: another command trains it; waiting", flush=True)
                if self.stopping.wait(1):
                    raise UsageError("stopped")
            self.locks[folder] = file.fileno()
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # a forked process may keep the file open

    def call(self, command: list[str], folder: Path, **streams: Any) -> int:
        """Run a process to its end and return its exit status. The process inherits the lock of
        its run, so that the lock outlives this command if it is killed."""
        if self.stopping.is_set():
            raise UsageError("stopped")
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        if not self.launcher.command:
            environment["OMP_NUM_THREADS"] = str(max(1, cores() // self.jobs))
        options: dict[str, Any] = {"text": True, "env": environment, "start_new_session": True}
        try:
            child = subprocess.Popen(command, **streams, **options, pass_fds=[self.locks[folder]])
        except OSError as error:
            raise UsageError(f"{command[0]}: cannot be run: {error.strerror}") from error
        self.children.add(child)
        if self.stopping.is_set():  # it was set after the children were ended
            end(child)
        try:
            code = child.wait()
        finally:
            self.children.discard(child)
        if self.stopping.is_set():
            raise UsageError("stopped")
        return code


def failure_of(future: Future[None]) -> str:
    """Return the error of a finished run in one line; empty if there is none."""
    error = future.exception()
    if error is None or isinstance(error, UsageError):
        return str(error or "")
    traceback.print_exception(error)  # for example a full disk
    return f"{type(error).__name__}: {error}"


def end(child: subprocess.Popen[str]) -> None:
    """Ask a process and its children to end."""
    if isinstance(child.args, list) and child.args[0] == "srun" and (job := own_job()):
        # At SIGTERM, srun would let its processes be killed after half a minute.
        subprocess.run(["scancel", "--signal", "TERM", job])
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
