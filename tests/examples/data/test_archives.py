"""The files of a package's archive."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.examples.data.made import write_archive


@pytest.mark.parametrize("name", ["a.whl", "a.tgz", "a.tar.gz"])
def test_archives_give_the_wanted_files_in_order(
    data: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    members = {"./b/y.txt": b"y", "./b/x.txt": b"x", "./b/no.txt": b"no", "./c.bin": b"c"}
    if name == "a.whl":
        members = {name.removeprefix("./"): contents for name, contents in members.items()}
    path = write_archive(tmp_path / name, members)
    found = list(data.archives.archive_files(path, ["b/*", "*.text"], ["*/no.*"]))
    assert found == [("b/x.txt", b"x"), ("b/y.txt", b"y")]


@pytest.mark.parametrize("name", ["a.deb", "a.whl", "a.tgz"])
def test_a_damaged_archive(data: SimpleNamespace, tmp_path: Path, name: str) -> None:
    path = write_archive(tmp_path / "a.tgz", {"./b/y.txt": b"y" * 10000}).rename(tmp_path / name)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(SystemExit, match=rf"{name}: damaged package; delete it and start again"):
        list(data.archives.archive_files(path, ["*"], []))
