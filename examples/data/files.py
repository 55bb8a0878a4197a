"""Files that are complete or not there, checksums, and steps that are done once."""

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
    """A document a line: {"id": ..., "text": ...}."""
    lines = (json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in documents)
    write_atomically(path, "".join(lines).encode("utf-8"))


def read_documents(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [(value["id"], value["text"]) for value in map(json.loads, file)]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_at_least_1(flag: str, value: int) -> None:
    """Ends the program in one line where the value of a flag is less."""
    if value < 1:
        sys.exit(f"{flag} {value}: must be at least 1")


def make_output(path: Path) -> None:
    """Makes the folder to build in; ends the program in one line where that cannot be."""
    try:
        (path / "work").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{path}: cannot be made a folder to build in: {error.strerror}")


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Steps:
    """Runs each step of a build once for the same settings, and keeps what it reports.

    `names` has the steps in the order in which they are run.
    """

    def __init__(self, output: Path, names: Sequence[str]) -> None:
        self.markers = {name: output / f"work/steps/{name}.json" for name in names}
        self.manifest = output / "manifest.json"

    def run(self, name: str, settings: Any, made: Iterable[Path], step: Callable[[], Any]) -> Any:
        """Returns what `step()` returned, now or when it last completed with these settings.

        `settings` is whatever decides the result: also the code and the settings of the steps
        before. `made` are the files that the step makes: without one of them it is run again.
        """
        marker = self.markers[name]
        wanted = fingerprint(settings)
        if marker.exists() and all(path.exists() for path in made):
            done = json.loads(marker.read_text(encoding="utf-8"))
            if done["settings"] == wanted:
                return done["report"]
        # Before the first file is replaced: from here on, until all is done again, the files are of
        # different builds.
        self.undo(name)
        start = time.monotonic()
        print(f"== {name}", flush=True)
        report = step()
        write_json(marker, {"settings": wanted, "report": report})
        print(f"   {time.monotonic() - start:.0f} s", flush=True)
        return report

    def undo(self, name: str) -> None:
        """Forgets that a step, those after it and the whole build were done."""
        names = list(self.markers)
        for later in names[names.index(name) :]:
            self.markers[later].unlink(missing_ok=True)
        self.manifest.unlink(missing_ok=True)
