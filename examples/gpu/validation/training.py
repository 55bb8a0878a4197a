"""Points 5, 6 and 7: training by fairseq's own command."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch

from .point import Row, Setting, bounded, tried

ROOT = Path(__file__).parents[3]
PRECISIONS = {
    "fp32": ("", 0.01),
    "bf16": ("--bf16", 0.03),
    "fp16": ("--fp16", 0.02),
    "fp16, not flat": ("--fp16 --fp16-no-flatten-grads", 0.02),
    "memory-efficient fp16": ("--memory-efficient-fp16", 0.03),
    "amp": ("--amp", 0.02),
    "checkpoint activations": ("--checkpoint-activations", 0.01),
}
"""Name -> flags, and the allowed distance of a loss from the CPU's fp32 loss, relative to it. On a
CPU bf16 reaches a distance of 0.009, with Avg-K after 30 updates."""

RESUMED_TOLERANCE = 0.01
"""Allowed distance after resuming, as the order of sums on a GPU differs from run to run."""


class Losses(logging.Handler):
    """Collects the training loss of each update from fairseq's log."""

    def __init__(self) -> None:
        super().__init__()
        self.by_update: dict[int, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "train_inner":
            self.take(record.getMessage())

    def take(self, line: str) -> None:
        """Read a line of JSON."""
        values = json.loads(line)
        self.by_update[int(values["num_updates"])] = float(values["loss"])


def write_data(setting: Setting) -> Path:
    """Write binarised sentences of a small grammar, which a model can learn."""
    from fairseq_cli import preprocess

    rng = random.Random(0)
    lines = []
    for _ in range(400 if setting.fake else 8000):
        subject, verb = f"n{rng.randrange(200)}", f"v{rng.randrange(40)}"
        lines.append(f"the {subject} {verb} the n{rng.randrange(200)} of {subject} .")
    # Stopped points leave files, and preprocessing does not overwrite them.
    folder = Path(tempfile.mkdtemp(prefix="data-", dir=setting.folder))
    (folder / "train").write_text("\n".join(lines) + "\n")
    (folder / "valid").write_text("\n".join(lines[:50]) + "\n")
    asked = ["--only-source", "--workers", "1", "--destdir", str(folder / "bin")]
    asked += ["--trainpref", str(folder / "train"), "--validpref", str(folder / "valid")]
    with quiet(), mock.patch.object(sys, "argv", ["fairseq-preprocess", *asked]):
        preprocess.cli_main()
    return folder / "bin"


@contextlib.contextmanager
def quiet(*handlers: logging.Handler) -> Iterator[None]:
    """Send fairseq's log to the handlers alone."""
    import fairseq.logging.metrics as metrics

    # Importing the command configures the log.
    import_module("fairseq_cli.train")
    import_module("fairseq_sffn.plugin")  # which --user-dir does not, if the framework is imported
    root = logging.getLogger()
    level, before = root.level, root.handlers
    root.handlers, root.level = list(handlers) or [logging.NullHandler()], logging.INFO
    metrics.reset()
    try:
        yield
    finally:
        metrics.reset()
        root.handlers, root.level = before, level


def flags(model: str, data: Path, device: str, fake: bool, updates: int, more: str) -> list[str]:
    """Return arguments of fairseq-train for the `_tiny` model. Dropout is off, as devices draw it
    differently."""
    context, sentences = (32, 4) if fake else (128, 8)
    where = "--cpu" if device == "cpu" else "--distributed-world-size 1"
    return [
        str(data),
        *shlex.split(
            f"--user-dir {shlex.quote(str(ROOT / 'fairseq_sffn'))} --task language_modeling "
            f"--arch transformer_lm_{model}_tiny --criterion sffn_cross_entropy --dropout 0 "
            f"--attention-dropout 0 --optimizer adam --lr 1e-3 --clip-norm 1.0 --seed 1 "
            f"--tokens-per-sample {context} --batch-size {sentences} --max-update {updates} "
            f"--num-workers 0 --log-format json --log-interval 1 --disable-validation "
            f"--no-epoch-checkpoints {where} {more}"
        ),
    ]


def train(model: str, data: Path, device: str, fake: bool, updates: int, more: str) -> list[float]:
    """Train in this process and return the losses."""
    from fairseq import checkpoint_utils
    from fairseq_cli import train as command

    # fairseq keeps the best loss in an attribute of a function.
    if hasattr(checkpoint_utils.save_checkpoint, "best"):
        del checkpoint_utils.save_checkpoint.best
    losses = Losses()
    asked = flags(model, data, device, fake, updates, more)
    with quiet(losses), mock.patch.object(sys, "argv", ["fairseq-train", *asked]):
        command.cli_main()
    if device == "cuda":
        torch.cuda.empty_cache()
    return [losses.by_update[update] for update in sorted(losses.by_update)]


def distance(got: list[float], want: list[float]) -> float:
    """Return the largest difference of two losses of one update, relative to the second."""
    if not want or len(got) != len(want) or not all(map(math.isfinite, got)):
        return math.inf
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(got, want, strict=True))


def curve(what: str, got: list[float], want: list[float], tolerance: float) -> Row:
    """Return a row with both curves."""
    return bounded(what, distance(got, want), tolerance, losses=got, expected=want)


def curves(setting: Setting) -> Iterator[Row]:
    """Compare every precision of Avg-K, and every method in bf16, with fp32 on a CPU (point 5)."""
    from fairseq_sffn.models.transformer_lm import METHODS

    data, fake = write_data(setting), setting.fake
    updates, few = (4, 2) if fake else (30, 10)
    want = train("avgk", data, "cpu", fake, updates, "--no-save")
    chosen = ("fp32", "checkpoint activations") if fake else tuple(PRECISIONS)
    for name in chosen:
        more, tolerance = PRECISIONS[name]

        def precision(name: str = name, more: str = more, tolerance: float = tolerance) -> Row:
            got = train("avgk", data, setting.device, fake, updates, f"--no-save {more}")
            return curve(f"avgk_tiny, {updates} updates, {name}", got, want, tolerance)

        yield tried(f"avgk_tiny, {name}", precision)
    models = ["dense", *(method.name for method in METHODS if method.selector)]
    precision_flag, tolerance = ("", 0.01) if fake else PRECISIONS["bf16"]
    for model in ("switch",) if fake else models:

        def method(model: str = model) -> Row:
            expected = train(model, data, "cpu", fake, few, "--no-save")
            more = f"--no-save {precision_flag}"
            got = train(model, data, setting.device, fake, few, more)
            what = f"{model}_tiny, {few} updates, {precision_flag or 'fp32'}"
            return curve(what, got, expected, tolerance)

        yield tried(f"{model}_tiny", method)


def resuming(setting: Setting) -> Iterator[Row]:
    """Check that a training resumes on the same and on another device as if it had not stopped
    (point 6)."""
    data, fake = write_data(setting), setting.fake
    here, half, whole = setting.device, 2 if fake else 4, 4 if fake else 8
    moves = list(dict.fromkeys([(here, here), (here, "cpu"), ("cpu", here)]))
    for optimizer in ("adam", "sffn_adam"):
        with_it = f"--optimizer {optimizer}"
        want = train("avgk", data, "cpu", fake, whole, f"--no-save {with_it}")
        for source, target in moves:
            what = f"{optimizer}: saved on {source}, resumed on {target}"

            def resumed(
                source: str = source,
                target: str = target,
                what: str = what,
                with_it: str = with_it,
                want: list[float] = want,
            ) -> Row:
                saved = setting.folder / re.sub(r"\W+", "-", what)
                save = f"--save-dir {shlex.quote(str(saved))} {with_it}"
                train("avgk", data, source, fake, half, save)
                restore = shlex.quote(str(saved / "checkpoint_last.pt"))
                more = f"--no-save --restore-file {restore} {with_it}"
                got = train("avgk", data, target, fake, whole, more)
                return curve(what, got, want[half:], RESUMED_TOLERANCE)

            yield tried(what, resumed)


def one_process(setting: Setting) -> Iterator[Row]:
    """Train with torchrun and one process, which dispatches tokens through its process group (point
    7)."""
    data, fake = write_data(setting), setting.fake
    updates = 2 if fake else 5
    want = train("avgk", data, setting.device, fake, updates, "--no-save")
    for backend in ("pytorch_ddp",) if fake else ("pytorch_ddp", "legacy_ddp"):
        more = f"--no-save --ddp-backend {backend}"
        asked = flags("avgk", data, setting.device, fake, updates, more)
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", "1", "-m", "fairseq_cli.train", *asked]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        losses = Losses()
        for line in re.findall(r"\| train_inner \| (\{.*\})", done.stdout + done.stderr):
            losses.take(line)
        got = [losses.by_update[update] for update in sorted(losses.by_update)]
        row = curve(f"torchrun, one process, {backend}", got, want, RESUMED_TOLERANCE)
        yield row if done.returncode == 0 else {**row, "log": (done.stdout + done.stderr)[-2000:]}
    yield tried("dispatch in a group of one rank", lambda: dispatched(setting))


def dispatched(setting: Setting) -> Row:
    """Compare a layer that dispatches tokens to a single rank with one that has no process
    group."""
    import torch.distributed as dist

    from fairseq_sffn.memory import ProcessGroups, SparseMemory

    from .layers import Case, build
    from .twins import errors, forward_backward

    backend = "nccl" if setting.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        memory, inputs = build(Case("switch", 64, engine="tiled"))
        sharded = SparseMemory(memory.config, ProcessGroups(blocks=dist.group.WORLD))
        sharded.load_state_dict(memory.state_dict())
        inputs = inputs.to(setting.device, torch.float32)
        _, want = forward_backward(memory.to(setting.device), inputs)
        _, got = forward_backward(sharded.to(setting.device), inputs)
    finally:
        dist.destroy_process_group()
    by_name = errors(got, {name: value.double() for name, value in want.items()})
    return bounded(f"dispatch in a group of one rank, {backend}", max(by_name.values()), 5e-5)
