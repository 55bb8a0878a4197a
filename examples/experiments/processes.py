"""Starts processes, and describes what they run on: cores, versions, machine."""

import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fairseq
import torch

import fairseq_sffn
from fairseq_sffn.fingerprint import code_fingerprint

PLUGIN = Path(fairseq_sffn.__file__).parent


def cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def python(module: str) -> list[str]:
    """Return the command line that runs a module."""
    return [sys.executable, "-W", "ignore", "-m", module]


def last_words(lines: Sequence[str]) -> str:
    """Return the last line of a failed process's output, without torchrun's report on it."""
    own = itertools.takewhile(lambda line: "distributed/elastic" not in line, lines)
    return next((line for line in reversed([*own]) if line.strip()), "")


def last_json(text: str) -> dict[str, Any]:
    """Parse the object at the end of an output, after lines that libraries printed."""
    lines = text.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("{"))
    return json.loads("\n".join(lines[start:]))


def versions() -> dict[str, str]:
    """Return the versions of the software.

    The plugin's is the last commit that changed it; ``code`` is the fingerprint of what trains.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(PLUGIN), *words, "--", "."]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    commit = git("log", "-1", "--format=%h", "--abbrev=10")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fairseq": fairseq.__version__,
        "fairseq_sffn": commit + "-dirty" * bool(git("status", "--porcelain")),
        "code": code_fingerprint(),
    }


def machine(device: str = "") -> str:
    """Name the GPU if there is one, or the processor, which ``--cpu`` asks for."""
    if device != "--cpu" and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")  # Linux; some processors have no model name there
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"
