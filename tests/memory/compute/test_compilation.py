"""Compilation of the C++ kernels, and its failures, in processes of their own."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_sffn.memory.compute import kernels
from tests.memory.cases import NATIVE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_start")]
ROOT = Path(__file__).parents[3]
REPORT = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
from fairseq_sffn.memory.compute import kernels
from fairseq_sffn.memory.compute.embedding_bag_kernels import RowOrder
print("kernels:", kernels.load() is not None, kernels.load() is not None)
"""


def environment(folder: Path, **changes: str) -> dict[str, str]:
    names = (kernels.SWITCH, "CXX")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, kernels.FOLDER: str(folder), "PYTHONPATH": str(ROOT), **changes}


def start(folder: Path, **changes: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", REPORT],
        **{"env": environment(folder, **changes), "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )


def report(folder: Path, **changes: str) -> str:
    return start(folder, **changes).communicate(timeout=300)[0]


@pytest.fixture
def compiler(tmp_path):
    """Make a command that copies an earlier compilation after a second. The name of the compiled
    file has the fingerprint of its source, so the earlier one is of the same source."""
    script = tmp_path / "copy"
    copy = f"shutil.copy({str(kernels._library())!r}, sys.argv[sys.argv.index('-o') + 1])"
    script.write_text(f"#!{sys.executable}\nimport shutil, sys, time\ntime.sleep(1)\n{copy}\n")
    script.chmod(0o755)
    return str(script)


@NATIVE
def test_compiled_once_by_one_of_several_workers(compiler, tmp_path):
    workers = [start(tmp_path, CXX=compiler) for _ in range(3)]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert all("kernels: True True" in output for output in outputs)
    assert sum("compiling" in output for output in outputs) == 1
    assert report(tmp_path, CXX="/nowhere/c++").splitlines() == ["kernels: True True"]
    folder = tmp_path / "fairseq_sffn"
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".so"]


def test_a_missing_compiler_is_named_once(tmp_path):
    lines = report(tmp_path, CXX="/nowhere/c++").splitlines()
    assert len(lines) == 2 and lines[1] == "kernels: False False"
    assert lines[0].startswith("WARNING no C++ kernels") and "compiler" in lines[0]


def test_what_the_compiler_says_is_told_in_a_line(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'In file x:' >&2\necho 'error: no' >&2\nexit 1\n")
    compiler.chmod(0o755)
    lines = report(tmp_path, CXX=shlex.quote(str(compiler))).splitlines()
    assert lines[1] == "WARNING no C++ kernels, so stock PyTorch computes: error: no"
    assert lines[2:] == ["kernels: False False"]
    assert not list((tmp_path / "fairseq_sffn").glob("*.so"))


@pytest.mark.parametrize("said", ["", r"\\377 error\\n"])
def test_a_compiler_that_says_nothing_or_anything(said, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\nprintf '{said}' >&2\nexit 1\n")
    compiler.chmod(0o755)
    lines = report(tmp_path, CXX=f"{shlex.quote(str(compiler))} -m64").splitlines()
    assert lines[1].startswith("WARNING no C++ kernels") and lines[2] == "kernels: False False"


@NATIVE
def test_a_file_that_does_not_load_is_made_again(compiler, tmp_path):
    report(tmp_path, CXX=compiler)
    (library,) = (tmp_path / "fairseq_sffn").glob("*.so")
    library.write_bytes(b"")
    assert "kernels: True True" in report(tmp_path, CXX=compiler)
    assert library.stat().st_size > 1000


@NATIVE
def test_code_that_others_could_write_is_not_loaded(compiler, tmp_path):
    report(tmp_path, CXX=compiler)
    (tmp_path / "fairseq_sffn").chmod(0o777)
    lines = report(tmp_path).splitlines()
    assert "can be written by others" in lines[0] and lines[1] == "kernels: False False"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    lines = report(tmp_path / "file", CXX=shlex.quote(sys.executable)).splitlines()
    assert len(lines) == 2 and lines[1] == "kernels: False False"


def test_a_compiler_whose_name_is_cut_off(tmp_path):
    lines = report(tmp_path, CXX="'c++").splitlines()
    assert lines[0].startswith(
        "WARNING no C++ kernels, so stock PyTorch computes: CXX='c++: No clo"
    )
    assert lines[1:] == ["kernels: False False"]


def test_switched_off(tmp_path):
    assert report(tmp_path, **{kernels.SWITCH: "off"}).splitlines() == ["kernels: False False"]
    assert not list(tmp_path.iterdir())
