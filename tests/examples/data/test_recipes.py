"""Flags that all recipes refuse, and their shell scripts."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.examples.data.made import SCRIPTS, make_folder, refusal


def test_recipes_refuse_a_file_as_output(data: SimpleNamespace, tmp_path: Path) -> None:
    folder, file = make_folder(tmp_path / "texts"), tmp_path / "file"
    file.write_text("")
    texts = [arg for split in data.gpt2_bpe.SPLITS for arg in (f"--{split}", file)]
    for out in (file, file / "inner"):
        expected = f"{out}: cannot be made a folder to build in: Not a directory"
        assert refusal(data.folder, folder, out) == expected
        assert refusal(data.laptop, "--output", out) == expected
        assert refusal(data.gpt2_bpe, out, *texts) == expected


def test_recipes_refuse_to_work_with_no_process(data: SimpleNamespace, tmp_path: Path) -> None:
    texts = [arg for split in data.gpt2_bpe.SPLITS for arg in (f"--{split}", tmp_path / "no.txt")]
    out, expected = tmp_path / "out", "--workers 0: must be at least 1"
    assert refusal(data.laptop, "--output", out, "--workers", 0) == expected
    assert refusal(data.gpt2_bpe, out, *texts, "--workers", 0) == expected
    assert refusal(data.gpt2_bpe, out, *texts) == f"{tmp_path}/no.txt: no such file"
    for domain in (["law"], ["a/b", "x.txt"], ["..", "x.txt"]):
        expected = f"--domain {' '.join(domain)}: must be a NAME of its own and FILES"
        assert refusal(data.gpt2_bpe, out, *texts, "--domain", *domain) == expected
    assert not out.exists()


@pytest.mark.parametrize("script", ["laptop.sh", "folder.sh", "gpt2_bpe.sh"])
def test_shell_scripts_are_valid(script: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True)
