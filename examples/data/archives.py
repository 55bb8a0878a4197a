"""Reads the wanted files of a fetched package."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path


def is_wanted(name: str, files: Iterable[str], exclude: Iterable[str]) -> bool:
    """Return whether a name matches a pattern of `files` and none of `exclude`; * matches / too."""
    return any(fnmatchcase(name, p) for p in files) and not any(
        fnmatchcase(name, p) for p in exclude
    )


def archive_files(path: Path, files: list[str], exclude: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of the wanted files of a .deb, .whl, .zip or .tar.*, in order of
    name.

    A file of another kind is the only file of its package.
    """
    try:
        found = read_archive(path, files, exclude)
    except (EOFError, tarfile.TarError, zipfile.BadZipFile):
        sys.exit(f"{path}: damaged package; delete it and start again")
    yield from sorted(found.items())


def read_archive(path: Path, files: list[str], exclude: list[str]) -> dict[str, bytes]:
    """Read the wanted files into memory, in any order.

    Raises:
        EOFError, TarError, BadZipFile: the archive is damaged.
    """
    if path.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(path)]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            found = read_tar(archive, files, exclude)
        if process.returncode:
            raise EOFError
    elif path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if is_wanted(n, files, exclude)]
            found = {name: archive.read(name) for name in names}
    elif ".tar" in path.suffixes or path.suffix == ".tgz":
        with tarfile.open(path) as archive:
            found = read_tar(archive, files, exclude)
    else:
        found = {path.name: path.read_bytes()}
    return found


def read_tar(archive: tarfile.TarFile, files: list[str], exclude: list[str]) -> dict[str, bytes]:
    found = {}
    for member in archive:
        name = member.name.removeprefix("./")
        if member.isfile() and is_wanted(name, files, exclude):
            file = archive.extractfile(member)
            assert file is not None
            found[name] = file.read()
    return found
