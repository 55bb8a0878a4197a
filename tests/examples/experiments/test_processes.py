"""The software versions that runs record, and the error lines of their processes."""

import subprocess
from pathlib import Path

import pytest

from experiments import processes
from experiments.processes import last_words, versions


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


def test_the_last_words_of_a_process() -> None:
    """torchrun's report on its processes is left out."""
    lines = [
        "| INFO | fairseq_cli.train | ...",
        "--sffn-block-size 7: does not divide",
        "",
        "E1127 10:00:00 11 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode)",
        "Traceback (most recent call last):",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:",
        "============================================================",
    ]
    assert last_words(lines) == "--sffn-block-size 7: does not divide"
    assert last_words(lines[:1]) == lines[0]
    assert last_words([]) == last_words(lines[3:]) == ""
