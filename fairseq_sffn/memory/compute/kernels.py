"""Compiles and loads the C++ kernels of ``kernels.cpp``.

The first use on a processor compiles them into the cache folder, which needs a C++ compiler.
Without one, stock PyTorch computes everything.
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
    """Load the kernels, after compiling them if needed.

    Returns:
        The namespace of ``torch.ops`` with the kernels. ``None`` if they cannot be compiled, or if
        the environment has ``FAIRSEQ_SFFN_KERNELS=off``.
    """
    if sys.platform != "linux" or not wanted():
        return None
    try:
        library = _library()
        try:
            torch.ops.load_library(library)
        except OSError:  # compiled for another system, or damaged
            torch.ops.load_library(_library(anew=True))
        return torch.ops.fairseq_sffn if hasattr(torch.ops.fairseq_sffn, "dots") else None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("no C++ kernels, so stock PyTorch computes: %s", _reason(error))
        return None


def wanted() -> bool:
    """Return whether the environment allows kernels in place of stock PyTorch."""
    return os.environ.get(SWITCH, "").lower() not in ("off", "0")


def supported(dtype: torch.dtype) -> bool:
    """Return whether the kernels can be loaded and compute tables of this dtype."""
    return dtype in DTYPES and load() is not None


def _reason(error: Exception) -> str:
    """Return the most informative line of an error."""
    said = getattr(error, "stderr", None) or b""
    lines = said.decode(errors="replace").strip().splitlines() or str(error).splitlines() or [""]
    return next((line for line in lines if "error" in line.lower()), lines[-1]).strip()


def _library(anew: bool = False) -> Path:
    """Return the path of the compiled file, after compiling it if needed.

    Args:
        anew: compile even if the file exists.

    Raises:
        OSError, subprocess.SubprocessError: the file cannot be compiled, or others can write it.
    """
    asked = os.environ.get(FOLDER, "")
    folder = Path(asked if os.path.isabs(asked) else Path.home() / ".cache") / "fairseq_sffn"
    library = folder / f"kernels-{_fingerprint()}.so"
    if not library.exists() or anew:
        compiler = _compiler()
        if shutil.which(compiler[0]) is None:
            raise FileNotFoundError("no C++ compiler found (c++, or what CXX names)")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One of several workers compiles. The lock is released when its process ends.
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists() or anew:
                logger.info("compiling C++ kernels for this processor, once: some seconds")
                _compile(compiler, library)
    _check_owner(library)
    return library


def _compiler() -> list[str]:
    """Return the compiler command: ``CXX``, or ``c++``.

    Raises:
        OSError: ``CXX`` has an unclosed quote.
    """
    command = os.environ.get("CXX") or "c++"
    try:
        return shlex.split(command)
    except ValueError as error:
        raise OSError(f"CXX={command}: {error}") from error


def _check_owner(library: Path) -> None:
    """Raise PermissionError if other users could have written the file."""
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
    """Hash everything that the compiled file depends on.

    Machines with different processors may share the cache folder.
    """
    processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    kind = [line for line in processor if line.startswith(("model name", "flags", "Features"))]
    parts = (SOURCE.read_text(), *FLAGS, torch.__version__)
    return hashlib.sha256("\n".join([*parts, *kind]).encode()).hexdigest()[:16]
