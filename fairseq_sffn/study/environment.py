"""What trainings run with: cores, versions, machine."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fairseq
import torch

PLUGIN = Path(__file__).parents[1]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def python(module: str) -> list[str]:
    """The command line that runs a module."""
    return [sys.executable, "-W", "ignore", "-m", module]


def last_words(lines: Sequence[str]) -> str:
    """What a failed process said last, before torchrun's report on all of them."""
    own = itertools.takewhile(lambda line: "distributed/elastic" not in line, lines)
    return next((line for line in reversed([*own]) if line.strip()), "")


def versions() -> dict[str, str]:
    """Of what is run; of the plugin the last commit that changed it, empty if it has none."""

    def git(*words: str) -> str:
        if not shutil.which("git"):
            return ""
        command = ["git", "-C", str(PLUGIN), *words, "--", "."]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    commit = git("log", "-1", "--format=%h", "--abbrev=10")
    if git("status", "--porcelain"):
        commit += "-dirty"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fairseq": fairseq.__version__,
        "fairseq_sffn": commit,
    }


def machine(device: str = "") -> str:
    """The processor with ``--cpu``, or the GPU if there is one."""
    if device != "--cpu" and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")  # of Linux; on some processors it has no such line
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"
