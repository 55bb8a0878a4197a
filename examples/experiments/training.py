"""Trains and evaluates one run, in processes of their own."""

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_sffn.checkpoints.reading import read_file
from fairseq_sffn.checkpoints.writing import write_checkpoint
from fairseq_sffn.errors import UsageError

from .files import Launcher, Scale
from .plan import Run, domains_of, train_arguments
from .processes import PLUGIN, last_json, last_words, machine, python, versions
from .results import EVALUATED, IN_DOMAIN, Results, curve, is_done, write


@dataclass
class Training:
    """Trains and evaluates runs of a scale."""

    scale: Scale
    launcher: Launcher
    results: Results
    work: Path  # folder for logs and checkpoints
    data: str  # fingerprint of the text

    def call(self, command: list[str], folder: Path, **streams: Any) -> int:
        """Run a process for the run of a folder and return its exit status."""
        raise NotImplementedError

    def folder(self, run: Run) -> Path:
        """Return the folder of a run's logs and checkpoints."""
        return self.work / run.key(self.scale)

    def train_and_evaluate(self, run: Run, sweep: bool, zero_shot: bool) -> None:
        """Start or resume a run, evaluate it and store its result."""
        folder = self.folder(run)
        checkpoint = folder / "checkpoints" / "checkpoint_last.pt"
        trained = self.train(run, checkpoint)
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
            shutil.rmtree(checkpoint.parent, ignore_errors=True)
            if not diverged:  # a row may need this run with its model
                (folder / "trained.json").unlink()

    def train(self, run: Run, last: Path) -> dict[str, Any]:
        """Train a run to its end, unless it is there already.

        Returns:
            ``outcome``, ``trained`` or ``diverged``, and the ``versions`` and ``machine`` of the
            training, from which those of a later evaluation may differ.
        """
        folder, outcome = self.folder(run), "trained"
        started, trained = folder / "started.json", folder / "trained.json"
        if trained.exists():
            found = json.loads(trained.read_text())
            if found["outcome"] == "diverged" or last.exists():
                return found
        # fairseq would add an update to a finished run.
        ended = updates_of(last) >= run.updates
        if not ended or not started.exists():  # the code may change before the run ends
            write(started, {"versions": versions(), "machine": machine(*self.device())})
        if not ended:
            outcome = self.call_training(run, folder / "train.log", last)
        if outcome == "trained" and (updates := updates_of(last)) != run.updates:
            raise UsageError(f"{last}: is after {updates} updates, not {run.updates}")
        found = {"outcome": outcome, **json.loads(started.read_text())}
        write(trained, found)
        return found

    def call_training(self, run: Run, log: Path, last: Path) -> str:
        """Run fairseq-train and return the outcome; see :meth:`train`."""
        launched = [os.path.expandvars(word) for word in shlex.split(self.launcher.command)]
        program = (
            [*launched, "-m", "fairseq_cli.train"] if launched else python("fairseq_cli.train")
        )
        arguments = self.arguments(run, str(last.parent), str(PLUGIN))
        # A run that begins anew has a log of its own.
        with log.open("a" if last.exists() else "w", encoding="utf-8") as out:
            start = out.tell()
            code = self.call(
                [*program, *arguments], log.parent, stdout=out, stderr=subprocess.STDOUT
            )
        if not code:
            return "trained"
        lines = log.read_bytes()[start:].decode("utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "FloatingPointError" in line]
        # Workers that disagree are a fault of the software, not of the model.
        if not errors or any("inconsistent between workers" in line for line in errors):
            raise UsageError(f"{log}: training failed: {last_words(lines)}")
        return "diverged"

    def evaluate(self, checkpoint: Path, sweep: bool) -> dict[str, Any]:
        """Measure perplexity in and out of domain, and the routing on the validation split; only
        perplexity on that split for a sweep."""
        names = IN_DOMAIN[:1] if sweep else IN_DOMAIN
        sets = {name: f"{self.scale.data}:{name}" for name in names}
        if not sweep:
            sets |= {domain.name: f"{domain}:test" for domain in domains_of(self.scale)}
        routing = [] if sweep else ["--routing", sets["valid"]]
        context = self.scale.tokens_per_sample
        flags = ["--tokens-per-sample", str(context), "--max-tokens", str(max(8192, context))]
        flags += ["--num-workers", "0"]  # for many small sets, starting a worker each takes longer
        found = self.tool("evaluate", checkpoint, *sets.values(), *routing, *flags)
        evaluation = {name: found["sets"][path] for name, path in sets.items()}
        return {"evaluation": evaluation, **({} if sweep else {"routing": found["routing"]})}

    def zero_shot(self, checkpoint: Path) -> dict[str, Any]:
        """Measure accuracy on the zero-shot tasks."""
        flags = ["--data", self.scale.data, "--requests", self.scale.requests]
        return self.tool("zero-shot", checkpoint, *flags, *shlex.split(self.scale.encoder))

    def device(self) -> list[str]:
        """Return the flags that choose the device of the evaluation."""
        return ["--cpu"] if "--cpu" in shlex.split(self.scale.flags) else []

    def tool(self, name: str, checkpoint: Path, *flags: str) -> dict[str, Any]:
        """Run a subcommand of ``fairseq-sffn`` and return its JSON."""
        folder = checkpoint.parents[1]
        out, errors = folder / f"{name}.json", folder / f"{name}.log"
        words = [*python("fairseq_sffn"), name, str(checkpoint), *flags, *self.device(), "--json"]
        with out.open("w") as stdout, errors.open("w") as stderr:
            code = self.call(words, folder, stdout=stdout, stderr=stderr)
        if code:
            lines = errors.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            raise UsageError(f"{errors}: fairseq-sffn {name} failed: {lines[-1]}")
        return last_json(out.read_text())

    def arguments(self, run: Run, save_dir: str, plugin: str) -> list[str]:
        """Return the arguments of fairseq-train."""
        return train_arguments(run, self.scale, self.launcher, self.scale.data, save_dir, plugin)

    def describe(self, run: Run) -> dict[str, Any]:
        """Return the settings of a run, its command and its training curve."""
        launched = " ".join(self.launcher.command.split())  # variables are not expanded
        program = f"{launched} -m fairseq_cli.train" if launched else "fairseq-train"
        return {
            **run.settings(self.scale),
            "data": self.data,
            "command": f"{program} {shlex.join(self.arguments(run, 'CHECKPOINTS', PLUGIN.name))}",
            "training": curve(self.folder(run) / "train.log"),
        }


def last_section(sweep: bool, zero_shot: bool) -> str:
    """Return the section with which the result of a run is complete."""
    return "evaluation" if sweep else "zero_shot" if zero_shot else EVALUATED


def updates_of(checkpoint: Path) -> int:
    """Return the updates before a checkpoint; 0 where there is none."""
    if not checkpoint.exists():
        return 0
    state = read_file(checkpoint, verify=False, mapped=True)
    return state["optimizer_history"][-1]["num_updates"]


def drop_optimizer(checkpoint: Path) -> None:
    """Remove the optimizer state and all other checkpoints. A sharded checkpoint is not changed."""
    for path in checkpoint.parent.glob("checkpoint*.pt"):
        if path != checkpoint:
            path.unlink()
    state = read_file(checkpoint, verify=False)
    if "last_optimizer_state" in state:
        state["last_optimizer_state"] = None
        write_checkpoint(state, str(checkpoint))
