"""Finds the kernels of ``kernels.cpp``: compiled once for this processor, then kept.

A C++ compiler is all they need, at the first use. Without one, everything is computed by stock
PyTorch.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-w")
DTYPES = (torch.float32, torch.float64)
SWITCH, FOLDER = "FAIRSEQ_SFFN_KERNELS", "XDG_CACHE_HOME"


@functools.cache
def load() -> Any:
    """The kernels, as ``torch.ops`` gives them; ``None`` where there are none.

    ``FAIRSEQ_SFFN_KERNELS=off`` does without.
    """
    if sys.platform != "linux" or not wanted():
        return None
    try:
        library = _library()
        try:
            torch.ops.load_library(library)
        except OSError:  # made for another system, or damaged
            torch.ops.load_library(_library(anew=True))
        return torch.ops.fairseq_sffn if hasattr(torch.ops.fairseq_sffn, "dots") else None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("no C++ kernels, so stock PyTorch computes: %s", _reason(error))
        return None


def wanted() -> bool:
    """Whether kernels are to compute what they can, rather than stock PyTorch."""
    return os.environ.get(SWITCH, "").lower() not in ("off", "0")


def supported(dtype: torch.dtype) -> bool:
    """Whether there are kernels for tables of this dtype."""
    return dtype in DTYPES and load() is not None


def _reason(error: Exception) -> str:
    """The line that says most."""
    said = getattr(error, "stderr", None) or b""
    lines = said.decode(errors="replace").strip().splitlines() or str(error).splitlines() or [""]
    return next((line for line in lines if "error" in line.lower()), lines[-1]).strip()


def _library(anew: bool = False) -> Path:
    """The compiled file.

    Args:
        anew: compile it even if it is there.

    Raises:
        OSError, subprocess.SubprocessError: it is not there and cannot be made, or is not to be
            trusted.
    """
    asked = os.environ.get(FOLDER, "")
    folder = Path(asked if os.path.isabs(asked) else Path.home() / ".cache") / "fairseq_sffn"
    library = folder / f"kernels-{_fingerprint()}.so"
    if not library.exists() or anew:
        compiler = _compiler()
        if shutil.which(compiler[0]) is None:
            raise FileNotFoundError("no C++ compiler found (c++, or what CXX names)")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Of several workers one compiles; the lock goes with the process that holds it.
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists() or anew:
                logger.info("compiling C++ kernels for this processor, once: some seconds")
                _compile(compiler, library)
    _check_owner(library)
    return library


def _compiler() -> list[str]:
    """The command that ``CXX`` names, or ``c++``.

    Raises:
        OSError: a quote in it is not closed.
    """
    command = os.environ.get("CXX") or "c++"
    try:
        return shlex.split(command)
    except ValueError as error:
        raise OSError(f"CXX={command}: {error}") from error


def _check_owner(library: Path) -> None:
    """Code that others could have written is not loaded."""
    for path in (library, library.parent):
        status = path.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
            raise PermissionError(f"{path} can be written by others")


def _compile(compiler: list[str], library: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        command = [*compiler, *FLAGS, "-isystem", torch_folder / "include", SOURCE, "-o", made]
        command += ["-L", torch_folder / "lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)
        made.chmod(0o700)
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(made, library)


def _fingerprint() -> str:
    """Of whatever the compiled file depends on: folders may be shared by different machines."""
    processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    kind = [line for line in processor if line.startswith(("model name", "flags", "Features"))]
    parts = (SOURCE.read_text(), *FLAGS, torch.__version__)
    return hashlib.sha256("\n".join([*parts, *kind]).encode()).hexdigest()[:16]
