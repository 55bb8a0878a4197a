"""Checks runs that are too large for this machine. It builds each model without memory for its
parameters, parses all flags, and trains a small copy for one update."""

import argparse
import os
import random
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_sffn.errors import UsageError

from .files import Launcher, Scale
from .frame import ONE_PROCESS, refused_flags
from .plan import train_arguments
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


def dry_run(runs: pd.DataFrame, scale: Scale, launcher: Launcher) -> Iterator[str]:
    """Check each model and set of flags once, and yield a line on each."""
    with tempfile.TemporaryDirectory() as folder:
        folders = (str(make_data(Path(folder))), f"{folder}/saved", str(PLUGIN))
        runs = runs.assign(name=[f"{run.model} {run.flags}" for run in runs.run])
        for name, run, model in runs.drop_duplicates("name")[["name", "run", "model"]].values:
            arguments = train_arguments(replace(run, lr=1.0), scale, launcher, *folders)
            convert_namespace_to_omegaconf(parse(arguments))
            update(arguments)
            yield f"{name}: {model.cost['params']:,} parameters, an update done"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of fairseq-train."""
    with refused_flags():
        return options.parse_args_and_arch(options.get_training_parser(), arguments)


def update(arguments: list[str]) -> None:
    """Train the small copy for one update."""
    narrow = [word for word in arguments if word not in ON_GPUS]
    if any(word.startswith(ONE_PROCESS[0]) for word in narrow):
        narrow += ONE_PROCESS
    narrow += NARROW
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [*python("fairseq_cli.train"), *narrow]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode or "num_updates" not in said:
        raise UsageError(f"fairseq-train {shlex.join(narrow)}: {last_words(said.splitlines())}")


def make_data(folder: Path) -> Path:
    """Preprocess a text of a few random words and return the folder."""
    draw, text, data = random.Random(1), folder / "text", folder / "bin"
    words = [f"w{i}" for i in range(50)]
    text.write_text("".join(" ".join(draw.choices(words, k=20)) + "\n" for _ in range(50)))
    command = [*python("fairseq_cli.preprocess"), "--only-source", "--destdir", str(data)]
    for split in ("train", "valid", "test"):
        command += [f"--{split}pref", str(text)]
    subprocess.run([*command, "--workers", "1"], check=True, capture_output=True)
    return data
