"""The fingerprint of the code that trains."""

from pathlib import Path

import pytest

from fairseq_sffn.fingerprint import PACKAGES, code_fingerprint


def test_names_and_contents_of_sources_count(tmp_path: Path) -> None:
    """Kernels count too. Other files do not."""
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "kernels.cpp").write_text("1")
    (folder / "a.py").write_text("1")
    found = [code_fingerprint(tmp_path)]
    (folder / "kernels.cpp").write_text("2")
    found.append(code_fingerprint(tmp_path))
    (folder / "a.py").rename(folder / "b.py")
    found.append(code_fingerprint(tmp_path))
    assert len(set(found)) == 3
    (folder / "notes.txt").write_text("1")
    assert code_fingerprint(tmp_path) == found[-1]


@pytest.mark.parametrize("package", [*PACKAGES, "tools", "checkpoints", "options", ""])
def test_only_the_code_that_trains_counts(package: str, tmp_path: Path) -> None:
    before = code_fingerprint(tmp_path)
    (tmp_path / package).mkdir(exist_ok=True)
    (tmp_path / package / "a.py").write_text("1")
    assert (code_fingerprint(tmp_path) != before) == (package in PACKAGES)


def test_every_package_is_there() -> None:
    assert all((Path(__file__).parents[1] / "fairseq_sffn" / name).is_dir() for name in PACKAGES)
    assert len(code_fingerprint()) == 16
