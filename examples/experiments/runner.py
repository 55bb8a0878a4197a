"""Trains and evaluates several runs at a time."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fairseq_sffn.errors import UsageError
from fairseq_sffn.tools.training_log import log_records

from .plan import Run
from .processes import cores
from .results import EVALUATED, missing
from .training import Training


@dataclass
class Runner(Training):
    """Trains and evaluates several runs at a time.

    Args:
        jobs: number of runs at a time.
    """

    jobs: int
    children: set[subprocess.Popen[str]] = field(default_factory=set, init=False)
    running: set[Run] = field(default_factory=set, init=False)
    locks: dict[Path, int] = field(default_factory=dict, init=False)
    stopping: threading.Event = field(default_factory=threading.Event, init=False)

    def run(self, runs: Sequence[Run], sweep: bool, zero_shot: Container[Run] = ()) -> None:
        """Finish all runs. A run that fails does not stop the others; the error comes at the end.

        Args:
            runs: runs without results.
            sweep: evaluate on the validation split only, and keep no model.
            zero_shot: the runs that are evaluated on zero-shot tasks.
        """
        failures: list[str] = []
        seconds = {run: run.expected_seconds(self.scale) for run in runs}
        layout = "{percentage:3.0f}% {elapsed}, {remaining} left{postfix}"
        options = {"total": sum(seconds.values()), "bar_format": layout, "smoothing": 0}
        options["disable"] = not runs
        interval = 1 if sys.stderr.isatty() else 60
        with tqdm(**options) as bar, ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self.finish, run, sweep, run in zero_shot): run for run in runs}
            waiting = set(futures)
            try:
                while waiting:
                    ended, waiting = wait(waiting, interval, return_when=FIRST_COMPLETED)
                    for future in ended:
                        run = futures[future]
                        failure = self.failure(future)
                        failures += failure
                        said = "".join(f"failed: {one}" for one in failure) or "done"
                        bar.write(f"{run.key(self.scale)} {said}")
                    updates = self.progress()
                    bar.n = sum(seconds[futures[future]] for future in {*futures} - waiting)
                    bar.n += sum(seconds[run] * n / run.updates for run, n in updates.items())
                    bar.set_postfix_str(f"{len(runs) - len(waiting)}/{len(runs)} runs")
            except BaseException:
                self.stop()
                for future in waiting:
                    future.cancel()
                self.wait_for_saving(waiting)
                raise
        if failures:
            among = "" if len(runs) == 1 else f"{len(failures)} of {len(runs)} runs failed: "
            raise UsageError(f"{among}{failures[0]}")

    def failure(self, future: Future[None]) -> list[str]:
        """Return the error of a finished run in one line, if it failed."""
        error = future.exception()
        if error is None:
            return []
        if isinstance(error, UsageError):
            return [str(error)]
        print("".join(traceback.format_exception(error)), flush=True)  # for example a full disk
        return [f"{type(error).__name__}: {error}"]

    def stop(self) -> None:
        """Ask all processes to end. Training processes finish an update and save; at the second
        request they end at once."""
        self.stopping.set()
        for child in list(self.children):
            end(child)

    def wait_for_saving(self, waiting: Iterable[Future[None]]) -> None:
        """Wait until all processes have ended, and pass further signals on to them."""
        while True:
            try:
                wait(waiting)
                return
            except KeyboardInterrupt:
                self.stop()

    def progress(self) -> dict[Run, float]:
        """Return the updates that each active run has done."""
        logs = {run: self.folder(run) / "train.log" for run in list(self.running)}
        found = {run: log_records(log)[-1:] for run, log in logs.items() if log.exists()}
        return {run: last["num_updates"] for run, records in found.items() for _, last in records}

    def finish(self, run: Run, sweep: bool, zero_shot: bool) -> None:
        """Start or resume a run, evaluate it and store its result."""
        section = "evaluation" if sweep else "zero_shot" if zero_shot else EVALUATED
        with self.locked(run):
            self.results.refresh(run)
            if missing([run], self.results, section):
                self.running.add(run)
                try:
                    self.train_and_evaluate(run, sweep, zero_shot)
                finally:
                    self.running.discard(run)

    @contextlib.contextmanager
    def locked(self, run: Run) -> Iterator[None]:
        """Wait until no other command works on a run, and keep others from it."""
        folder = self.folder(run)
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
                del self.locks[folder]
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


def end(child: subprocess.Popen[str]) -> None:
    """Ask a process and its children to end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
