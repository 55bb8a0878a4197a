"""Trains and evaluates runs, several at a time, in processes of their own."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shlex
import shutil
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

import torch
from fairseq import checkpoint_utils
from tqdm import tqdm

from fairseq_sffn.errors import UsageError
from fairseq_sffn.tools.training_log import log_records

from .files import Launcher, Scale
from .plan import Run, domains_of, train_arguments
from .processes import PLUGIN, cores, last_json, last_words, machine, python, versions
from .results import EVALUATED, Results, curve, is_done, missing, write


@dataclass
class Runner:
    """Trains and evaluates runs.

    Args:
        scale: scale of the runs.
        launcher: how their processes are started.
        results: where results are stored.
        work: folder for logs and checkpoints.
        data: fingerprint of the text.
        jobs: number of runs at a time.
    """

    scale: Scale
    launcher: Launcher
    results: Results
    work: Path
    data: str
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
        interval = 1 if sys.stderr.isatty() else 60
        with (
            tqdm(total=sum(seconds.values()), bar_format=layout, disable=not runs) as bar,
            ThreadPoolExecutor(self.jobs) as pool,
        ):
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
        print("".join(traceback.format_exception(error)), flush=True)  # a full disk, say
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

    def folder(self, run: Run) -> Path:
        """Return the folder of a run's logs and checkpoints."""
        return self.work / run.key(self.scale)

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

    def train_and_evaluate(self, run: Run, sweep: bool, zero_shot: bool) -> None:
        """See :meth:`finish`."""
        folder = self.folder(run)
        checkpoint = folder / "checkpoints" / "checkpoint_last.pt"
        trained = self.train(run)
        diverged = trained.pop("outcome") == "diverged"
        result = self.describe(run) | trained
        before = self.results.get(run) or {}
        if before.get("training") == result["training"]:  # the stored result is from this training
            result = before | result
        if diverged:
            result |= {"evaluation": {"valid": {"loss": None}}, "routing": {}}
        else:
            drop_optimizer(checkpoint)
            if not is_done(result, "evaluation" if sweep else EVALUATED):
                result |= self.evaluate(checkpoint, sweep)
        self.results.add(run, result)
        if zero_shot and not diverged:
            self.results.add(run, result | {"zero_shot": self.zero_shot(checkpoint)})
        if sweep:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if not diverged:  # a row may need this run with its model
                (folder / "trained.json").unlink()

    def train(self, run: Run) -> dict[str, Any]:
        """Train a run to its end, unless it is there already.

        Returns:
            ``outcome``, ``trained`` or ``diverged``, and the ``versions`` and ``machine`` of the
            training, from which those of a later evaluation may differ.
        """
        folder = self.folder(run)
        started, trained = folder / "started.json", folder / "trained.json"
        last = folder / "checkpoints" / "checkpoint_last.pt"
        if trained.exists():
            found = json.loads(trained.read_text())
            if found["outcome"] == "diverged" or last.exists():
                return found
        outcome = "trained"
        # fairseq would add an update to a finished run.
        ended = updates_of(last) >= run.updates
        if not ended or not started.exists():  # the code may change before the run ends
            write(started, {"versions": versions(), "machine": machine(*self.device())})
        if not ended:
            outcome = self.call_training(run, folder, last)
        if outcome == "trained" and (updates := updates_of(last)) != run.updates:
            raise UsageError(f"{last}: is after {updates} updates, not {run.updates}")
        found = {"outcome": outcome, **json.loads(started.read_text())}
        write(trained, found)
        return found

    def call_training(self, run: Run, folder: Path, last: Path) -> str:
        """Run fairseq-train and return the outcome; see :meth:`train`."""
        arguments = train_arguments(
            run, self.scale, self.launcher, self.scale.data, str(last.parent), str(PLUGIN)
        )
        command = [*python("fairseq_cli.train"), *arguments]
        if self.launcher.command:
            launched = [os.path.expandvars(word) for word in shlex.split(self.launcher.command)]
            command = [*launched, "-m", "fairseq_cli.train", *arguments]
        log = folder / "train.log"
        # A run that begins anew has a log of its own.
        with log.open("a" if last.exists() else "w", encoding="utf-8") as out:
            start = out.tell()
            code = self.call(command, folder, stdout=out, stderr=subprocess.STDOUT)
        if not code:
            return "trained"
        lines = log.read_bytes()[start:].decode("utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "FloatingPointError" in line]
        # Workers that disagree are a fault of the software, not of the model.
        if not errors or any("inconsistent between workers" in line for line in errors):
            raise UsageError(f"{log}: training failed: {last_words(lines)}")
        return "diverged"

    def evaluate(self, checkpoint: Path, sweep: bool) -> dict[str, Any]:
        """Measure perplexity in and out of domain, and the routing on the validation split."""
        sets = {"valid": f"{self.scale.data}:valid"}
        if not sweep:
            sets["test"] = f"{self.scale.data}:test"
            sets |= {domain.name: f"{domain}:test" for domain in domains_of(self.scale)}
        routing = [] if sweep else ["--routing", sets["valid"]]
        context = self.scale.tokens_per_sample
        flags = ["--tokens-per-sample", str(context), "--max-tokens", str(max(8192, context))]
        flags += ["--num-workers", "0"]  # for many small sets, starting a worker each takes longer
        found = self.tool("evaluate", checkpoint, *sets.values(), *routing, *flags, *self.device())
        evaluation = {name: found["sets"][path] for name, path in sets.items()}
        return {"evaluation": evaluation, **({} if sweep else {"routing": found["routing"]})}

    def zero_shot(self, checkpoint: Path) -> dict[str, Any]:
        """Measure accuracy on the zero-shot tasks."""
        flags = ["--data", self.scale.data, "--requests", self.scale.requests]
        flags += shlex.split(self.scale.encoder)
        return self.tool("zero-shot", checkpoint, *flags, *self.device())

    def device(self) -> list[str]:
        """Return the flags that choose the device of the evaluation."""
        return ["--cpu"] if "--cpu" in shlex.split(self.scale.flags) else []

    def tool(self, name: str, checkpoint: Path, *flags: str) -> dict[str, Any]:
        """Run a subcommand of ``fairseq-sffn`` and return its JSON."""
        folder = checkpoint.parents[1]
        out, errors = folder / f"{name}.json", folder / f"{name}.log"
        command = [*python("fairseq_sffn"), name, str(checkpoint), *flags, "--json"]
        with out.open("w") as stdout, errors.open("w") as stderr:
            code = self.call(command, folder, stdout=stdout, stderr=stderr)
        if code:
            lines = errors.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            raise UsageError(f"{errors}: fairseq-sffn {name} failed: {lines[-1]}")
        return last_json(out.read_text())

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

    def describe(self, run: Run) -> dict[str, Any]:
        """Return the settings of a run, its command and its training curve."""
        arguments = train_arguments(
            run, self.scale, self.launcher, self.scale.data, "CHECKPOINTS", PLUGIN.name
        )
        launched = " ".join(self.launcher.command.split())  # variables are not expanded
        program = f"{launched} -m fairseq_cli.train" if launched else "fairseq-train"
        return {
            **run.settings(self.scale),
            "data": self.data,
            "command": f"{program} {shlex.join(arguments)}",
            "training": curve(self.folder(run) / "train.log"),
        }


def end(child: subprocess.Popen[str]) -> None:
    """Ask a process and its children to end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)


def updates_of(checkpoint: Path) -> int:
    """Return the updates before a checkpoint; 0 where there is none."""
    if not checkpoint.exists():
        return 0
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # PyTorch raises many kinds
        reason = last_words(str(error).splitlines())
        raise UsageError(f"{checkpoint}: cannot be read: {reason}") from error
    return state["optimizer_history"][-1]["num_updates"]


def drop_optimizer(checkpoint: Path) -> None:
    """Remove the optimizer state and all other checkpoints. A sharded checkpoint is not changed."""
    for path in checkpoint.parent.glob("checkpoint*.pt"):
        if path != checkpoint:
            path.unlink()
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if "last_optimizer_state" in state:
        state["last_optimizer_state"] = None
        checkpoint_utils.torch_persistent_save(state, str(checkpoint))
