"""Versions of the software that runs record."""

import subprocess
from pathlib import Path

import pytest

from experiments import processes
from experiments.processes import versions


def test_the_version_is_that_of_the_plugin_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results that are added beside the plugin do not change its version."""
    plugin, beside = tmp_path / "plugin" / "code.py", tmp_path / "results.json"
    plugin.parent.mkdir()
    monkeypatch.setattr(processes, "PLUGIN", plugin.parent)

    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(path: Path, text: str) -> str:
        path.write_text(text)
        git("add", ".")
        git("commit", "-q", "-m", text)
        return git("rev-parse", "HEAD")[:10]

    assert versions()["fairseq_sffn"] == ""
    git("init", "-q")
    first = commit(plugin, "a")
    assert versions()["fairseq_sffn"] == first
    commit(beside, "b")
    beside.write_text("c")
    assert versions()["fairseq_sffn"] == first
    plugin.write_text("d")
    assert versions()["fairseq_sffn"] == f"{first}-dirty"
    assert commit(plugin, "e") == versions()["fairseq_sffn"] != first
