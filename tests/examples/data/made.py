"""Makes small texts, folders and packages, and runs the recipes on them."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[3] / "examples" / "data"


def make_words(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("aeioubcdfglmnprst", k=rng.randint(3, 9))) for _ in range(count)]


WORDS = make_words(400)


def make_text(seed: object, paragraphs: int = 6, words: int = 20) -> str:
    rng = random.Random(str(seed))
    lines = (" ".join(rng.choices(WORDS, k=words)).capitalize() + "." for _ in range(paragraphs))
    return "\n".join(lines)


def make_folder(path: Path) -> Path:
    (path / "part").mkdir(parents=True)
    for i in range(60):
        text = make_text(("folder", i)).replace("\n", "\n\n")
        (path / ("part" if i % 2 else ".") / f"{i}.txt").write_text(text)
    (path / "copy.txt").write_text((path / "2.txt").read_text())
    (path / ".hidden").write_bytes(b"\xff")
    return path


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as archive:
            for name, contents in members.items():
                archive.writestr(name, contents)
        return path
    with tarfile.open(path, "w:gz") as archive:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return path


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def refusal(script: ModuleType, *argv: object) -> str:
    """Return the one line with which a script refuses its arguments."""
    with pytest.raises(SystemExit) as stop:
        script.main(list(map(str, argv)))
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code
