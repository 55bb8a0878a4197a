"""Checks trainings that are too large for this machine: each model is built without memory for its
parameters, every flag is parsed, and a narrow copy is trained for an update."""

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

from ..errors import UsageError
from .environment import PLUGIN, last_words, python
from .outcomes import ONE_PROCESS, build_model
from .plan import Cell, Launcher, Scale, train_arguments

NARROW = (
    *("--decoder-embed-dim", "64", "--decoder-attention-heads", "4", "--decoder-layers", "6"),
    *("--tokens-per-sample", "32", "--batch-size", "2", "--update-freq", "1", "--max-update", "1"),
    *("--cpu", "--distributed-world-size", "1", "--num-workers", "0", "--no-save"),
)
"""What is smaller in the copy. The FFN and its blocks are as wide as they are."""
ON_GPUS = {
    *("--amp", "--fp16", "--bf16", "--memory-efficient-fp16", "--memory-efficient-bf16"),
    "--fp16-no-flatten-grads",
}
"""What a CPU does not do."""


def dry_run(cells: Sequence[Cell], scale: Scale, launcher: Launcher) -> Iterator[str]:
    """Checks each model and set of flags once; gives a line on each.

    Raises:
        UsageError: one of them would not train.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        seen = set()
        for cell in cells:
            if (cell.model, cell.flags) in seen:
                continue
            seen.add((cell.model, cell.flags))
            arguments = train_arguments(
                cell, scale, launcher, str(data), f"{folder}/saved", str(PLUGIN)
            )
            convert_namespace_to_omegaconf(parse(arguments))
            parameters = build_model(cell.model, cell.flags, scale).cost["params"]
            update(arguments)
            yield f"{cell.model} {cell.flags}: {parameters:,} parameters, an update done"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the arguments of fairseq-train.

    Raises:
        UsageError: it would not take them.
    """
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
    """Trains the narrow copy for an update.

    Raises:
        UsageError: with its last words, if it fails.
    """
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
    """A folder as fairseq-preprocess makes it, of a few random words."""
    draw = random.Random(1)
    words = [f"w{i}" for i in range(50)]
    text = folder / "text"
    text.write_text("".join(" ".join(draw.choices(words, k=20)) + "\n" for _ in range(50)))
    data = folder / "bin"
    command = ["--only-source", "--destdir", str(data), "--workers", "1"]
    for split in ("train", "valid", "test"):
        command += [f"--{split}pref", str(text)]
    subprocess.run([*python("fairseq_cli.preprocess"), *command], check=True, capture_output=True)
    return data
