"""Hands the cells of a table to a batch system."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import UsageError
from .environment import python
from .plan import Cell, Launcher, Scale


def submit(
    cells: Iterable[Cell], scale: Scale, launcher: Launcher, work: Path, again: Sequence[str]
) -> Iterable[str]:
    """Hands trainings to a batch system, a script each, which comes back here for its cell alone.
    One that was handed over and has not ended since is not handed over again.

    Args:
        again: the command line that the scripts run, but for ``--only KEY``.
    """
    for cell in cells:
        key = cell.key(scale)
        script, submitted = work / key / "job.sh", work / key / "submitted"
        if submitted.exists():
            yield f"{key}: submitted before; if it is gone, delete {submitted}"
            continue
        script.parent.mkdir(parents=True, exist_ok=True)
        name = f"#SBATCH --job-name {key}"
        trap = f"trap {shlex.quote(shlex.join(['rm', '-f', str(submitted.absolute())]))} EXIT"
        command = shlex.join([*python("fairseq_sffn"), *again, "--only", key])
        lines = ["#!/bin/bash", name, *launcher.header, trap, command]
        script.write_text("\n".join(lines) + "\n")
        submitted.touch()  # first, as the script deletes it
        try:
            said = call([*shlex.split(launcher.submit), str(script)])
        except BaseException:
            submitted.unlink(missing_ok=True)
            raise
        yield f"{key}: {said}"


def call(command: list[str]) -> str:
    """What a command says.

    Raises:
        UsageError: it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UsageError(f"{command[0]}: cannot be run: {error.strerror}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [""])[-1]
        raise UsageError(f"{shlex.join(command)}: {reason}")
    return done.stdout.strip()
