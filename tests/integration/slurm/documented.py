"""The documents' lines for Slurm, and their form for the tests' cluster."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from tests import commands

PAGE = commands.ROOT / "fairseq_sffn" / "expert_parallel" / "README.md"


def blocks(document: Path) -> list[str]:
    """Return the indented blocks of a document, without their indentation."""
    text = "\n" + document.read_text(encoding="utf-8")
    return [textwrap.dedent(block) for block in re.findall(r"(?:\n    .*|\n(?=\n    ))+", text)]


def batch_script() -> str:
    """Return the page's batch script."""
    (script,) = [block for block in blocks(PAGE) if "#SBATCH" in block]
    return script.strip() + "\n"


def submissions() -> list[list[str]]:
    """Return the flags of each line of the page that submits the script."""
    (lines,) = [block for block in blocks(PAGE) if re.search(r"^sbatch ", block, flags=re.M)]
    words = [shlex.split(line, comments=True) for line in lines.strip().splitlines()]
    assert all(line[0] == "sbatch" and line[-1] == "train.sh" for line in words)
    return [line[1:-1] for line in words]


def requeues() -> list[str]:
    """Return the page's commands that put a job back into the queue. ``JOB`` is its number."""
    return re.findall(r"^\| `(.* JOB)` \|", PAGE.read_text(encoding="utf-8"), flags=re.M)


def on_cpus(text: str, port: int) -> str:
    """Return lines for Slurm in their form for two small nodes: two nodes instead of eight, one
    or two processes a node instead of eight, one core instead of 32, and a free port.

    The GPUs stay. Slurm counts them, and nobody uses them.
    """
    text = re.sub(r"--nodes 8\b", "--nodes 2", text)
    text = re.sub(r"--gpus-per-node 8\b", "--gpus-per-node 1", text)
    text = re.sub(r"--cpus-per-task \d+", "--cpus-per-task 1", text)
    return re.sub(r":29500\b", f":{port}", text)


def with_training(script: str, program: Sequence[object], arguments: Sequence[object]) -> str:
    """Return the page's script with a training in place of ``fairseq-train`` and ``DATA-BIN ...``.

    Args:
        script: the batch script.
        program: Python file and its arguments, which torchrun starts.
        arguments: arguments of fairseq-train.
    """
    placeholder = '"$(which fairseq-train)" DATA-BIN ...'
    assert script.count(placeholder) == 1
    return script.replace(placeholder, shlex.join(map(str, (*program, *arguments))))
