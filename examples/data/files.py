"""Writes files atomically, computes checksums, and runs each step of a build once."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_documents(path: Path, documents: Iterable[tuple[str, str]]) -> None:
    """Write a document per line: {"id": ..., "text": ...}."""
    lines = (json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in documents)
    write_atomically(path, "".join(lines).encode("utf-8"))


def read_documents(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [(value["id"], value["text"]) for value in map(json.loads, file)]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_at_least_1(flag: str, value: int) -> None:
    """End the program with one line if the value of a flag is less than 1."""
    if value < 1:
        sys.exit(f"{flag} {value}: must be at least 1")


def make_output(path: Path) -> None:
    """Make the folder to build in. End the program with one line if that fails."""
    try:
        (path / "work").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{path}: cannot be made a folder to build in: {error.strerror}")


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Steps:
    """Runs each step of a build once for the same settings, and keeps its report.

    Args:
        output: folder of the build.
        names: names of the steps, in the order in which they run.
    """

    def __init__(self, output: Path, names: Sequence[str]) -> None:
        self.markers = {name: output / f"work/steps/{name}.json" for name in names}
        self.manifest = output / "manifest.json"

    def run(self, name: str, settings: Any, made: Iterable[Path], step: Callable[[], Any]) -> Any:
        """Run a step unless it is done with these settings, and return its report.

        Args:
            name: name of the step.
            settings: everything that determines the result, including the code and the settings of
                earlier steps.
            made: files that the step makes; if one is missing, the step runs again.
            step: function that does the work and returns a report.
        """
        marker = self.markers[name]
        wanted = fingerprint(settings)
        if marker.exists() and all(path.exists() for path in made):
            done = json.loads(marker.read_text(encoding="utf-8"))
            if done["settings"] == wanted:
                return done["report"]
        # This comes before the first file is replaced: until all steps are done again, the files
        # belong to different builds.
        self.undo(name)
        start = time.monotonic()
        print(f"== {name}", flush=True)
        report = step()
        write_json(marker, {"settings": wanted, "report": report})
        print(f"   {time.monotonic() - start:.0f} s", flush=True)
        return report

    def undo(self, name: str) -> None:
        """Mark a step, all steps after it and the whole build as not done."""
        names = list(self.markers)
        for later in names[names.index(name) :]:
            self.markers[later].unlink(missing_ok=True)
        self.manifest.unlink(missing_ok=True)
