"""Checks runs that are too large for this machine. It builds each model without memory for its
parameters, parses all flags, and trains a small copy for one update."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import itertools
import os
import random
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY

from fairseq_sffn.errors import UsageError

from .files import Launcher, Scale
from .frame import ONE_PROCESS, build_model
from .plan import Run, train_arguments
from .processes import PLUGIN, last_words, python

NARROW = (
    *("--decoder-embed-dim", "64", "--decoder-attention-heads", "4", "--decoder-layers", "6"),
    *("--tokens-per-sample", "32", "--batch-size", "2", "--update-freq", "1", "--max-update", "1"),
    *("--cpu", "--distributed-world-size", "1", "--num-workers", "0", "--no-save"),
)
"""Flags that make the copy small. The FFN and its blocks keep their width."""
ON_GPUS = {
    *("--amp", "--fp16", "--bf16", "--memory-efficient-fp16", "--memory-efficient-bf16"),
    "--fp16-no-flatten-grads",
}
"""Flags that a CPU does not support."""


def dry_run(runs: Sequence[Run], scale: Scale, launcher: Launcher) -> Iterator[str]:
    """Check each model and set of flags once, and yield a line on each."""
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for run in {(run.model, run.flags): run for run in reversed(runs)}.values():
            arguments = train_arguments(
                run, scale, launcher, str(data), f"{folder}/saved", str(PLUGIN)
            )
            convert_namespace_to_omegaconf(parse(arguments))
            parameters = build_model(run.model, run.flags, scale).cost["params"]
            update(arguments)
            yield f"{run.model} {run.flags}: {parameters:,} parameters, an update done"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of fairseq-train."""
    words = dict(itertools.pairwise(arguments))
    if (arch := words["--arch"]) not in ARCH_MODEL_REGISTRY:
        close = ", ".join(difflib.get_close_matches(arch, ARCH_MODEL_REGISTRY))
        raise UsageError(f"--arch {arch}: is unknown" + (f"; there is {close}" if close else ""))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return options.parse_args_and_arch(options.get_training_parser(), arguments)
    except SystemExit as error:
        reason = said.getvalue().strip().rpartition("error: ")[2] or str(error)
        raise UsageError(f"fairseq-train does not take these flags: {reason}") from error


def update(arguments: list[str]) -> None:
    """Train the small copy for one update."""
    narrow = [word for word in arguments if word not in ON_GPUS]
    if any(word.startswith(ONE_PROCESS[0]) for word in narrow):
        narrow += ONE_PROCESS
    done = subprocess.run(
        [*python("fairseq_cli.train"), *narrow, *NARROW],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    if done.returncode or "num_updates" not in done.stdout + done.stderr:
        reason = last_words((done.stdout + done.stderr).splitlines())
        raise UsageError(f"fairseq-train {shlex.join([*narrow, *NARROW])}: {reason}")


def make_data(folder: Path) -> Path:
    """Preprocess a text of a few random words and return the folder."""
    draw = random.Random(1)
    words = [f"w{i}" for i in range(50)]
    text, data = folder / "text", folder / "bin"
    text.write_text("".join(" ".join(draw.choices(words, k=20)) + "\n" for _ in range(50)))
    command = [*python("fairseq_cli.preprocess"), "--only-source", "--destdir", str(data)]
    for split in ("train", "valid", "test"):
        command += [f"--{split}pref", str(text)]
    subprocess.run([*command, "--workers", "1"], check=True, capture_output=True)
    return data
