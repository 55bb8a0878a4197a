"""Points that check the CUDA path on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .point import Row, Setting, asserted, told

SCRIPTS = Path(__file__).parents[1]


def compiled(setting: Setting) -> Iterator[Row]:
    """Compile the kernels in Triton for one kind of card."""
    if importlib.util.find_spec("triton") is None:
        yield told("kernels in Triton", skipped="there is no package triton")
        return
    made = setting.folder / "kernels.json"
    asked = ["--capabilities", "90", "--dtypes", "bfloat16", "--json", str(made)]
    yield from _script("compile_kernels.py", asked, made)


def fake_cuda(setting: Setting) -> Iterator[Row]:
    """Run every selector over fake CUDA tensors."""
    made = setting.folder / "fake_cuda.json"
    if shutil.which("c++") is None:
        yield told("fake CUDA tensors", skipped="there is no C++ compiler")
        return
    yield from _script("fake_cuda.py", ["--quick", "--json", str(made)], made)


def _script(name: str, asked: list[str], made: Path) -> Iterator[Row]:
    """Run a script and yield a row that tells whether it succeeded."""
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / name), *asked]
    done = subprocess.run(command, cwd=SCRIPTS.parents[1], capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines()[-20:]
    row = asserted(name, done.returncode == 0, said=said[-1:] if done.returncode == 0 else said)
    if made.is_file():
        row["results"] = json.loads(made.read_text())
    yield row
