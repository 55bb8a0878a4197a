"""Trains and evaluates the cells of a table that have no result yet."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary

from ..checkpoints.writing import write_checkpoint
from ..errors import UsageError
from .environment import PLUGIN, cores, last_words, machine, python, versions
from .plan import Cell, Launcher, Scale, domains_of, train_arguments
from .results import IN_DOMAIN, WHOLE, Results, curve, is_done, log_records, missing, write


def fingerprint(scale: Scale) -> str:
    """Of the text: the binarised splits in and out of domain, and the dictionary.

    Raises:
        UsageError: there is no such text, or it has another dictionary than the scale says.
    """
    data = Path(scale.data)
    files = [data / "dict.txt", *(data / f"{split}.bin" for split in ("train", *IN_DOMAIN))]
    if scale.domains and not Path(scale.domains).is_dir():
        raise UsageError(f"{scale.domains}: there is no such folder; see examples/data/README.md")
    domains = list(domains_of(scale))
    files += [domain / "test.bin" for domain in domains]
    indices = [path.with_suffix(".idx") for path in files[1:]]
    for path in (*files, *indices, *(domain / "dict.txt" for domain in domains)):
        if not path.exists():
            raise UsageError(f"{path}: is missing; see examples/data/README.md")
    for domain in domains:
        if domain.name in IN_DOMAIN:
            raise UsageError(f"{domain}: {domain.name} is the name of a set in domain")
        if (domain / "dict.txt").read_bytes() != files[0].read_bytes():
            raise UsageError(f"{domain / 'dict.txt'}: is another dictionary than {files[0]}")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if (types := len(Dictionary.load(str(files[0])))) != scale.dictionary:
        raise UsageError(
            f"dictionary {scale.dictionary} of scale {scale.name}: {files[0]} has {types} types"
        )
    return digest.hexdigest()[:12]


@dataclass
class Runner:
    """Trains cells in processes of their own, several at a time.

    Args:
        scale: see :class:`Scale`.
        launcher: that starts a training.
        results: where results go.
        work: folder for logs and checkpoints.
        data: fingerprint of the text.
        jobs: trainings at a time.
        say: prints a line.
    """

    scale: Scale
    launcher: Launcher
    results: Results
    work: Path
    data: str
    jobs: int
    say: Callable[[str], None]
    children: set[subprocess.Popen[str]] = field(default_factory=set, init=False)
    running: set[Cell] = field(default_factory=set, init=False)
    locks: dict[Path, int] = field(default_factory=dict, init=False)
    stopping: threading.Event = field(default_factory=threading.Event, init=False)

    def run(self, cells: Sequence[Cell], sweep: bool, zero_shot: Container[Cell] = ()) -> None:
        """Brings all cells to their end.

        Args:
            cells: without results.
            sweep: evaluate on the validation split alone, and keep no model.
            zero_shot: those that are evaluated on zero-shot tasks too.

        Raises:
            UsageError: a training failed, which the others do not mind.
        """
        start = time.monotonic()
        failures: list[UsageError] = []
        total = sum(cell.expected_seconds(self.scale) for cell in cells)
        done = 0.0
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {
                pool.submit(self.finish, cell, sweep, cell in zero_shot): cell for cell in cells
            }
            waiting = set(futures)
            try:
                while waiting:
                    ended, waiting = wait(waiting, timeout=60, return_when=FIRST_COMPLETED)
                    for future in ended:
                        what = "done"
                        try:
                            future.result()
                        except UsageError as error:
                            what = f"failed: {error}"
                            failures.append(error)
                        except Exception as error:  # a full disk, say
                            self.say(traceback.format_exc())
                            what = f"failed: {type(error).__name__}: {error}"
                            failures.append(UsageError(f"{futures[future].key(self.scale)} {what}"))
                        done += futures[future].expected_seconds(self.scale)
                        left = (time.monotonic() - start) * (total - done) / max(done, 1e-9)
                        name = futures[future].key(self.scale)
                        self.say(
                            f"{len(cells) - len(waiting)}/{len(cells)} {name} {what}, "
                            f"{left / 60:.0f} minutes left"
                        )
                    if not ended:
                        self.say("; ".join(self.progress()))
            except BaseException:
                self.stop()
                for future in waiting:
                    future.cancel()
                self.wait_for_saving(waiting)
                raise
        if failures:
            among = "" if len(cells) == 1 else f"{len(failures)} of {len(cells)} trainings failed: "
            raise UsageError(f"{among}{failures[0]}")

    def stop(self) -> None:
        """Asks all processes to end. Trainings finish an update and save; a second time they end at
        once."""
        self.stopping.set()
        for child in list(self.children):
            end(child)

    def wait_for_saving(self, waiting: Iterable[Future[None]]) -> None:
        """Waits until all processes have ended, and passes further signals on to them."""
        while True:
            try:
                wait(waiting)
                return
            except KeyboardInterrupt:
                self.stop()

    def progress(self) -> Iterable[str]:
        """Where each training that runs is."""
        for cell in sorted(self.running, key=lambda cell: cell.key(self.scale)):
            log = self.folder(cell) / "train.log"
            if log.exists():
                records = log_records(log)
                last = records[-1][1] if records else {"num_updates": 0, "loss": float("nan")}
                where = f"{last['num_updates']:.0f}/{cell.updates}"
                yield f"{cell.key(self.scale)} {where} loss {last['loss']:.3f}"

    def folder(self, cell: Cell) -> Path:
        """Of a cell's logs and checkpoints."""
        return self.work / cell.key(self.scale)

    def finish(self, cell: Cell, sweep: bool, zero_shot: bool) -> None:
        """Trains a cell, or goes on with it, evaluates it and keeps the result."""
        self.running.add(cell)
        try:
            with self.locked(cell):
                self.results.refresh(cell)
                if missing([cell], self.results, part_of(sweep, zero_shot)):
                    self.bring_to_end(cell, sweep, zero_shot)
        finally:
            self.running.discard(cell)

    @contextlib.contextmanager
    def locked(self, cell: Cell) -> Iterator[None]:
        """Of all runs, one trains a cell at a time; the others wait."""
        folder = self.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("a") as file:
            for tries in itertools.count():
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if not tries:
                    self.say(f"{folder.name}: another run trains it; waiting")
                if self.stopping.wait(1):
                    raise UsageError("stopped")
            self.locks[folder] = file.fileno()
            try:
                yield
            finally:
                del self.locks[folder]
                fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked may keep it open

    def bring_to_end(self, cell: Cell, sweep: bool, zero_shot: bool) -> None:
        """See :meth:`finish`."""
        folder = self.folder(cell)
        checkpoint = folder / "checkpoints" / "checkpoint_last.pt"
        trained = self.train(cell)
        diverged = trained.pop("outcome") == "diverged"
        result = self.describe(cell) | trained
        before = self.results.get(cell) or {}
        if before.get("training") == result["training"]:  # what it has is of this training
            result = before | result
        if diverged:
            result |= {"evaluation": {"valid": {"loss": None}}, "routing": {}}
        else:
            drop_optimizer(checkpoint)
            if not is_done(result, part_of(sweep, zero_shot=False)):
                result |= self.evaluate(checkpoint, sweep)
        self.results.add(cell, result)
        if zero_shot and not diverged:
            self.results.add(cell, result | {"zero_shot": self.zero_shot(checkpoint)})
        if sweep:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if not diverged:  # a row may ask for this training, and its model
                (folder / "trained.json").unlink()

    def train(self, cell: Cell) -> dict[str, Any]:
        """Trains a cell to its end, unless that was done.

        Returns:
            ``outcome``, which is ``trained``, or ``diverged`` to numbers that are none, and with
            which ``versions`` on which ``machine``: evaluation may come later.
        """
        folder = self.folder(cell)
        started, trained = folder / "started.json", folder / "trained.json"
        save_dir = folder / "checkpoints"
        if trained.exists():
            found = json.loads(trained.read_text())
            if found["outcome"] == "diverged" or (save_dir / "checkpoint_last.pt").exists():
                return found
        last = save_dir / "checkpoint_last.pt"
        outcome = "trained"
        # fairseq would add an update to a training that is at its end.
        ended = updates_of(last) >= cell.updates
        if not ended or not started.exists():  # code may change before the end is seen
            write(started, {"versions": versions(), "machine": machine(*self.device())})
        if not ended:
            outcome = self.call_training(cell, folder, save_dir)
        if outcome == "trained" and (updates := updates_of(last)) != cell.updates:
            raise UsageError(f"{last}: is after {updates} updates, not {cell.updates}")
        found = {"outcome": outcome, **json.loads(started.read_text())}
        write(trained, found)
        return found

    def call_training(self, cell: Cell, folder: Path, save_dir: Path) -> str:
        """Runs fairseq-train; what came of it, see :meth:`train`."""
        arguments = train_arguments(
            cell, self.scale, self.launcher, self.scale.data, str(save_dir), str(PLUGIN)
        )
        command = [*python("fairseq_cli.train"), *arguments]
        if self.launcher.command:
            launched = [os.path.expandvars(word) for word in shlex.split(self.launcher.command)]
            command = [*launched, "-m", "fairseq_cli.train", *arguments]
        log = folder / "train.log"
        # Of one training: what began anew says nothing of what was before.
        resumed = (save_dir / "checkpoint_last.pt").exists()
        with log.open("a" if resumed else "w", encoding="utf-8") as out:
            start = out.tell()
            code = self.call(command, folder, stdout=out, stderr=subprocess.STDOUT)
        if not code:
            return "trained"
        with log.open("rb") as said:
            said.seek(start)
            lines = said.read().decode("utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "FloatingPointError" in line]
        # Workers that disagree are a fault that says nothing of the model.
        if not errors or any("inconsistent between workers" in line for line in errors):
            raise UsageError(f"{log}: training failed: {last_words(lines)}")
        return "diverged"

    def evaluate(self, checkpoint: Path, sweep: bool) -> dict[str, Any]:
        """Perplexity in and out of domain, and the routing on the validation split."""
        sets = {"valid": f"{self.scale.data}:valid"}
        if not sweep:
            sets["test"] = f"{self.scale.data}:test"
            sets |= {domain.name: f"{domain}:test" for domain in domains_of(self.scale)}
        routing = [] if sweep else ["--routing", sets["valid"]]
        context = self.scale.tokens_per_sample
        flags = ["--tokens-per-sample", str(context), "--max-tokens", str(max(8192, context))]
        flags += ["--num-workers", "0"]  # for many small sets a process each takes longer
        found = self.tool("evaluate", checkpoint, *sets.values(), *routing, *flags, *self.device())
        evaluation = {name: found["sets"][path] for name, path in sets.items()}
        return {"evaluation": evaluation, **({} if sweep else {"routing": found["routing"]})}

    def zero_shot(self, checkpoint: Path) -> dict[str, Any]:
        """Accuracy on the tasks."""
        flags = ["--data", self.scale.data, "--requests", self.scale.requests]
        flags += shlex.split(self.scale.encoder)
        return self.tool("zero-shot", checkpoint, *flags, *self.device())

    def device(self) -> list[str]:
        """Flags of where evaluation runs."""
        return ["--cpu"] if "--cpu" in shlex.split(self.scale.flags) else []

    def tool(self, name: str, checkpoint: Path, *flags: str) -> dict[str, Any]:
        """What a subcommand of ``fairseq-sffn`` finds."""
        folder = checkpoint.parents[1]
        out = folder / f"{name}.json"
        errors = out.with_suffix(".log")
        command = [*python("fairseq_sffn"), name, str(checkpoint), *flags, "--json"]
        with out.open("w") as stdout, errors.open("w") as stderr:
            code = self.call(command, folder, stdout=stdout, stderr=stderr)
        if code:
            lines = errors.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            raise UsageError(f"{errors}: fairseq-sffn {name} failed: {lines[-1]}")
        return last_json(out.read_text())

    def call(self, command: list[str], folder: Path, **streams: Any) -> int:
        """Runs a process to its end, unless all are to stop. It holds the lock of the cell in that
        folder, if this process is killed, until it ends."""
        if self.stopping.is_set():
            raise UsageError("stopped")
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        if not self.launcher.command:
            environment["OMP_NUM_THREADS"] = str(max(1, cores() // self.jobs))
        try:
            child = subprocess.Popen(
                command,
                **streams,
                text=True,
                env=environment,
                start_new_session=True,
                pass_fds=[self.locks[folder]],
            )
        except OSError as error:
            raise UsageError(f"{command[0]}: cannot be run: {error.strerror}") from error
        self.children.add(child)
        if self.stopping.is_set():  # after all others were ended
            end(child)
        try:
            code = child.wait()
        finally:
            self.children.discard(child)
        if self.stopping.is_set():
            raise UsageError("stopped")
        return code

    def describe(self, cell: Cell) -> dict[str, Any]:
        """What a training was, and how it went."""
        arguments = train_arguments(
            cell, self.scale, self.launcher, self.scale.data, "CHECKPOINTS", PLUGIN.name
        )
        launched = " ".join(self.launcher.command.split())  # variables stay as they are written
        program = f"{launched} -m fairseq_cli.train" if launched else "fairseq-train"
        return {
            **cell.settings(self.scale),
            "data": self.data,
            "command": f"{program} {shlex.join(arguments)}",
            "training": curve(self.folder(cell) / "train.log"),
        }


def part_of(sweep: bool, zero_shot: bool) -> str:
    """The part of a result that comes last."""
    return "evaluation" if sweep else "zero_shot" if zero_shot else WHOLE


def end(child: subprocess.Popen[str]) -> None:
    """Asks a process and those that it started to end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)


def updates_of(checkpoint: Path) -> int:
    """Updates before a checkpoint; 0 where there is none.

    Raises:
        UsageError: it cannot be read.
    """
    if not checkpoint.exists():
        return 0
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds
        raise UsageError(
            f"{checkpoint}: cannot be read: {last_words(str(error).splitlines())}"
        ) from error
    return state["optimizer_history"][-1]["num_updates"]


def last_json(text: str) -> dict[str, Any]:
    """The object that ends a text, after lines that libraries printed."""
    lines = text.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("{"))
    return json.loads("\n".join(lines[start:]))


def drop_optimizer(checkpoint: Path) -> None:
    """Leaves the model alone of all that a training keeps. A checkpoint in parts stays as it is."""
    for path in checkpoint.parent.glob("checkpoint*.pt"):
        if path != checkpoint:
            path.unlink()
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if "last_optimizer_state" in state:
        state["last_optimizer_state"] = None
        write_checkpoint(state, str(checkpoint))
