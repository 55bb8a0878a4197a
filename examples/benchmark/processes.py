"""Measures training steps of two processes on one machine, data and expert parallel.

Each process keeps its batch (weak scaling), so ideal scaling doubles the tokens per second.
torchrun starts the processes once, and they take all steps in turn. For the times of one process,
rank 0 trains a model and a Trainer without process groups while rank 1 waits. When both ranks train
such models at once, their times show how much the machine itself slows two processes down.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fairseq.logging import metrics
from timing import SEED, Work, arguments, progress, run_part, seconds, spread
from train_step import (
    CONTEXT,
    SENTENCES,
    build_trainer,
    flags,
    random_batch,
    training_config,
    write_dictionary,
)

from fairseq_sffn.expert_parallel.launch import obey_launcher

PROCESSES = 2
MODELS = ("dense", "avgk", "switch")
OPTIMIZER = "sffn_adam"
BACKENDS = ("legacy_ddp", "pytorch_ddp")


class Run(NamedTuple):
    """A way in which the processes train together."""

    ddp_backend: str
    expert_parallel: int = 1

    def flags(self, model: str) -> str:
        """Return the flags of fairseq-train."""
        if self == APART:
            return "--distributed-world-size 1"
        sharding = "" if model == "dense" else f" --sffn-expert-parallel {self.expert_parallel}"
        return f"--ddp-backend {self.ddp_backend}{sharding}"


APART = Run("none, apart")
"""Both ranks train separate models at the same time: the machine's limit without communication."""


# In each process that torchrun starts.


class Step:
    """A training step of all processes, together or separate."""

    def __init__(self, folder: Path, model: str, run: Run, context: int, sentences: int) -> None:
        more = run.flags(model)
        config = training_config(model, OPTIMIZER, str(folder), context, sentences, more)
        if run != APART:
            obey_launcher(config.distributed_training)
        torch.manual_seed(SEED)
        self.trainer = build_trainer(config)
        if run == APART:
            self.trainer.get_model().work_alone()
        torch.manual_seed(SEED + dist.get_rank())
        self.batch = random_batch(context, sentences)
        self.sent_bytes = 0.0

    def prepare(self) -> None:
        metrics.reset()  # metrics belong to the process and differ between models
        dist.barrier()

    def run(self) -> None:
        self.sent_bytes = self.trainer.train_step([self.batch]).get("sent_bytes", 0)

    def run_on_rank_0(self) -> None:
        if dist.get_rank() == 0:
            self.run()


def step_seconds(works: list[Work], repeats: int, label: str) -> list[list[float]]:
    """Time each work in rounds of all works in turn. The slowest process counts, as the others wait
    for it. The first round is not counted."""
    own: list[list[float]] = []
    for i in range(repeats + 1):
        own.append([seconds(work) for work in works])
        if dist.get_rank() == 0:
            progress(f"{label} round {i}/{repeats}", last=i == repeats)
    of_all: list[Any] = [None] * PROCESSES
    dist.all_gather_object(of_all, own[1:])
    return torch.tensor(of_all, dtype=torch.float64).amax(dim=0).t().tolist()


def measure_model(
    model: str, folder: Path, repeats: int, context: int, sentences: int
) -> list[dict[str, Any]]:
    """Return a JSON row for each way to train a model in several processes."""
    counts = (1,) if model == "dense" else (1, PROCESSES)
    runs = [APART, *(Run(backend, count) for backend in BACKENDS for count in counts)]
    steps = [Step(folder, model, run, context, sentences) for run in runs]
    works = [Work(steps[0].run_on_rank_0, steps[0].prepare)]
    works += [Work(step.run, step.prepare) for step in steps]
    one, *others = step_seconds(works, repeats, f"training steps of {model}")
    times, rows = dict(zip(runs, others, strict=True)), []
    for run, step in zip(runs, steps, strict=True):
        several, tokens = times[run], context * sentences
        asked = " ".join(flags(model, OPTIMIZER, context, sentences, run.flags(model)))
        launcher = f'torchrun --standalone --nproc_per_node {PROCESSES} "$(which fairseq-train)"'
        row = {
            **{"model": model, "processes": PROCESSES, **run._asdict()},
            "speedup": spread(PROCESSES * x / y for x, y in zip(one, several, strict=True)),
            **{"seconds": spread(several), "base_seconds": spread(one)},
            "tokens_per_second": PROCESSES * tokens / spread(several)["median"],
            "base_tokens_per_second": tokens / spread(one)["median"],
            "stands_for": f"{'fairseq-train' if run == APART else launcher} DATA {asked}",
        }
        if run.expert_parallel > 1:
            data_parallel = times[run._replace(expert_parallel=1)]
            row["ratio"] = spread(x / y for x, y in zip(several, data_parallel, strict=True))
            row["sent_bytes"] = step.sent_bytes
        rows.append(row)
    return rows


def work(folder: Path) -> None:
    """Measure as a file in the folder says, and write the rows beside it."""
    logging.disable(logging.INFO)
    asked = json.loads((folder / "asked.json").read_text())
    torch.set_num_threads(asked.pop("threads"))
    dist.init_process_group("gloo")
    models = asked.pop("models")
    rows = [row for model in models for row in measure_model(model, folder, **asked)]
    if dist.get_rank() == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


# In the process that starts them.


def measure(
    repeats: int,
    threads: int = 1,
    models: tuple[str, ...] = MODELS,
    context: int = CONTEXT,
    sentences: int = SENTENCES,
) -> list[dict[str, Any]]:
    """Return a JSON row for each model and way to train it."""
    asked = {"repeats": repeats, "threads": threads, "models": models}
    asked |= {"context": context, "sentences": sentences}
    variables = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)  # the code that this process would run
    with tempfile.TemporaryDirectory() as folder:
        write_dictionary(Path(folder))
        Path(folder, "asked.json").write_text(json.dumps(asked))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc_per_node", str(PROCESSES), __file__, folder]
        subprocess.run(command, env={**os.environ, **variables}, check=True)
        return json.loads(Path(folder, "rows.json").read_text())


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    run_part("processes", args, lambda: measure(args.repeats, args.threads))


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        work(Path(sys.argv[1]))
    else:
        main()
