"""Packages are fetched through stand-ins of the registries' clients."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

NPM_SOURCE = {"name": "poems", "registry": "npm", "package": "poems-doc", "version": "1.0"}


def make_client(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_fetch_once_through_the_client(
    data: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = tmp_path / "clients"
    monkeypatch.setenv("PATH", str(clients), prepend=os.pathsep)
    make_client(clients, "npm", 'echo "$@" >poems-doc-1.0.tgz')
    partial = tmp_path / "downloads" / "poems.partial"
    partial.mkdir(parents=True)
    (partial / "half.tgz").write_text("interrupted")

    path, package = data.fetch.fetch(NPM_SOURCE, tmp_path / "downloads", tmp_path)
    assert path.read_text() == "pack --silent poems-doc@1.0\n"
    assert package["package"] == "poems-doc"
    assert package["version"] == "1.0"
    assert package["sha256"] == data.files.sha256(path)
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == ["poems"]

    later = NPM_SOURCE | {"version": "2.0"}
    make_client(clients, "npm", "exit 1")
    with pytest.raises(SystemExit, match=r"\Apoems-doc 2\.0: could not be fetched"):
        data.fetch.fetch(later, tmp_path / "downloads", tmp_path)
    assert data.fetch.fetch(NPM_SOURCE, tmp_path / "downloads", tmp_path) == (path, package)
    make_client(clients, "npm", 'echo "$@" >poems-doc-2.0.tgz')
    path, package = data.fetch.fetch(later, tmp_path / "downloads", tmp_path)
    assert path.read_text() == "pack --silent poems-doc@2.0\n" and package["version"] == "2.0"


def test_fetch_prefers_the_version_of_the_reference(
    data: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian's mirrors keep earlier versions for a while."""
    clients = tmp_path / "clients"
    monkeypatch.setenv("PATH", str(clients), prepend=os.pathsep)
    make_client(clients, "apt-cache", '[ "$2" = x-doc-6=6.1 ] || [ "$1" = depends ] || exit 100')
    make_client(clients, "apt-get", "echo $3 | sed 's/^[^=]*$/&=6.2/' >x.deb")
    make_client(clients, "dpkg-deb", "sed 's/=/\\t/' $2")

    def fetched(**more: Any) -> tuple[str, str]:
        source = {"name": "x", "registry": "debian", "package": "x-doc-6", **more}
        path, package = data.fetch.fetch(source, tmp_path / "downloads", tmp_path)
        assert path.read_text().strip() == f"{package['package']}={package['version']}"
        return package["package"], package["version"]

    assert fetched(reference=("x-doc-6", "6.0")) == ("x-doc-6", "6.2")
    assert fetched(reference=("x-doc-6", "6.1")) == ("x-doc-6", "6.1")
    assert fetched() == ("x-doc-6", "6.1")
    assert fetched(reference=("x-doc-6", "6.1"), depends="*") == ("x-doc-6", "6.1")
    # What was fetched is used where Debian's commands are missing.
    monkeypatch.setenv("PATH", "")
    assert fetched(reference=("x-doc-6", "6.0")) == ("x-doc-6", "6.1")


def test_fetch_says_in_one_line_what_is_missing(
    data: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = tmp_path / "clients"
    make_client(clients, "npm", "echo noise >&2; echo 404 not found >&2; exit 1")
    make_client(clients, "apt-cache", "exit 0")
    make_client(clients, "apt-get", "echo E: no such package >&2; exit 100")
    monkeypatch.setenv("PATH", str(clients), prepend=os.pathsep)
    debian = {"name": "x", "registry": "debian", "package": "x-doc"}
    with pytest.raises(SystemExit, match=r"\Apoems-doc 1\.0: .* npm \(.*\): 404 not found\Z"):
        data.fetch.fetch(NPM_SOURCE, tmp_path / "downloads", tmp_path)
    with pytest.raises(SystemExit, match=r"\Ax-doc: .* debian \(run `apt-get update`.*package\Z"):
        data.fetch.fetch(debian, tmp_path / "downloads", tmp_path)
    with pytest.raises(SystemExit, match=r"\Ax-doc: could not be fetched from debian .*\)\Z"):
        data.fetch.fetch(debian | {"depends": "x-doc-*"}, tmp_path / "downloads", tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"\Apoems-doc: npm is needed .* not on PATH\Z"):
        data.fetch.fetch(NPM_SOURCE, tmp_path / "downloads", tmp_path)
    assert not (tmp_path / "downloads" / "poems").exists()
