"""Submits runs to a batch system such as Slurm."""

import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fairseq_sffn.errors import UsageError

from .files import Launcher, Scale
from .plan import Run


def submit(
    runs: Iterable[Run], scale: Scale, launcher: Launcher, work: Path, again: Sequence[str]
) -> Iterable[str]:
    """Submit a batch script for each run, and yield a line on each. The script calls this command,
    whose arguments are ``again``, for its run alone. A run whose script has been submitted and has
    not ended is left alone."""
    for run in runs:
        key = run.key(scale)
        script, submitted = work / key / "job.sh", work / key / "submitted"
        if submitted.exists():
            yield f"{key}: submitted before; if it is gone, delete {submitted}"
            continue
        script.parent.mkdir(parents=True, exist_ok=True)
        name = f"#SBATCH --job-name {key}"
        trap = f"trap {shlex.quote(shlex.join(['rm', '-f', str(submitted.absolute())]))} EXIT"
        package = str(Path(__file__).parent)
        command = shlex.join([sys.executable, "-W", "ignore", package, *again, "--only", key])
        script.write_text("\n".join(["#!/bin/bash", name, *launcher.header, trap, command, ""]))
        submitted.touch()  # before the script, which deletes it, can start
        words = [*shlex.split(launcher.submit), str(script)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=True)
        except BaseException as error:
            submitted.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise UsageError(f"{words[0]}: cannot be run: {error.strerror}") from error
            if isinstance(error, subprocess.CalledProcessError):
                reason = (error.stderr.strip().splitlines() or [""])[-1]
                raise UsageError(f"{shlex.join(words)}: {reason}") from error
            raise
        yield f"{key}: {done.stdout.strip()}"
