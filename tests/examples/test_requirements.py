"""The environments that examples/venv.sh and tests/versions.sh make, and the requirements of
setup.py."""

import ast
import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fairseq_sffn.versions import OLDEST_PYTORCH

ROOT = Path(__file__).parents[2]
LEFT_OUT = {"ve-fairseq": {"torchaudio"}, "fairseq-sffn": {"torchaudio"}}
"""Package -> requirements that are left out. These packages are installed without dependencies."""
OWN_ENVIRONMENTS = {"eval", "export"}
"""Extras that are not installed beside the pinned packages, because they change some of them."""
BUILT_WITH = {"torch": {"setuptools"}}
"""Package -> requirements that are only build tools."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "examples" / "requirements.txt").read_text().splitlines()
    named = (line.split("==") for line in lines if "==" in line)
    return {canonical(name): version for name, version in named}


def pinned() -> list[str]:
    return list(pins())


def said_by_setup(keyword: str) -> Any:
    """Return what setup.py passes to ``setup``. The installed metadata may belong to an earlier
    version."""
    (call,) = (
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "setup"
    )
    return next(ast.literal_eval(one.value) for one in call.keywords if one.arg == keyword)


def asked_for() -> dict[str, SpecifierSet]:
    """Return package -> versions that setup.py allows, with the extras that are installed."""
    extras = said_by_setup("extras_require")
    lines = sum(
        (extras[name] for name in extras.keys() - OWN_ENVIRONMENTS),
        start=said_by_setup("install_requires"),
    )
    return {canonical(one.name): one.specifier for one in map(Requirement, lines)}


def table_of_versions() -> list[tuple[str, str]]:
    """Return the combinations of Python and PyTorch in tests/versions.sh."""
    text = (ROOT / "tests" / "versions.sh").read_text()
    return re.findall(r"^(3\.\d+) (\d+\.\d+)$", text, re.M)


def required_by(package: str) -> set[str]:
    """Return the packages that a package needs on this machine, without extras and a GPU's
    libraries."""
    lines = importlib.metadata.requires(package) or []
    names = {canonical(re.split(r"[^\w.-]", line)[0]) for line in lines if ";" not in line}
    return names - LEFT_OUT.get(package, set()) - BUILT_WITH.get(package, set())


@pytest.mark.parametrize("package", pinned())
def test_what_a_package_needs_is_pinned(package: str) -> None:
    assert required_by(package) <= set(pinned())


def test_the_project_needs_nothing_else() -> None:
    assert required_by("fairseq-sffn") <= set(pinned())


def test_torchaudio_is_left_out() -> None:
    """Its latest release does not load with this PyTorch, and packages that find it import it."""
    assert "torchaudio" not in pinned()
    if importlib.util.find_spec("torchaudio"):
        importlib.import_module("torchaudio")


@pytest.mark.parametrize("package", sorted(asked_for()))
def test_a_range_includes_the_pin(package: str) -> None:
    if package in LEFT_OUT["fairseq-sffn"]:
        pytest.skip("is not installed")
    assert asked_for()[package].contains(pins()[package])


@pytest.mark.parametrize("package", ["torch", "ve-fairseq", "fairscale"])
def test_pip_replaces_no_newer_version(package: str) -> None:
    """Only fairseq and fairscale require PyTorch, and they accept any version."""
    required = [Requirement(line) for line in said_by_setup("install_requires")]
    operators = {part.operator for one in required if one.name == package for part in one.specifier}
    assert operators == (set() if package == "torch" else {">="})


def test_the_ranges_are_those_that_were_run() -> None:
    """The table of versions has both ends of the range of PyTorch, and every Python."""
    pythons, pytorches = map(set, zip(*table_of_versions(), strict=True))
    allowed = SpecifierSet(said_by_setup("python_requires"))
    assert pythons == {f"3.{minor}" for minor in range(20) if allowed.contains(f"3.{minor}")}
    classifiers = said_by_setup("classifiers")
    assert classifiers == [f"Programming Language :: Python :: {one}" for one in sorted(pythons)]

    minors = sorted(int(one.removeprefix("2.")) for one in pytorches)
    assert str(asked_for()["torch"]) == str(SpecifierSet(f">=2.{minors[0]},<2.{minors[-1] + 1}"))
    assert f"2.{minors[0]}" == OLDEST_PYTORCH


def test_the_support_page_has_the_table_of_versions() -> None:
    rows = re.findall(
        r"^ *\| 20\d\d-\d\d-\d\d \| (3\.\d+)\.\d+ \| (\d+\.\d+)\.",
        (ROOT / ".github" / "SUPPORT.md").read_text(),
        re.M,
    )
    assert rows == table_of_versions()


def copied_project(tmp_path: Path) -> Path:
    """Copy what examples/venv.sh reads into a project of its own."""
    project = tmp_path / "project"
    for name in ("setup.py", "examples/requirements.txt", "examples/venv.sh"):
        (project / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / name, project / name)
    return project


def in_bash(
    command: str, programs: Path, cwd: Path, *needed: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in bash with some of this machine's programs, and those of a folder."""
    for name in ("cat", "cmp", "dirname", *needed):
        (programs / name).symlink_to(str(shutil.which(name)))
    return subprocess.run(
        [str(shutil.which("bash")), "-c", command],
        cwd=cwd,
        env={"PATH": str(programs)},
        capture_output=True,
        text=True,
    )


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        (["3.11", "3.12"], "python3.11"),
        (["3.12"], "python3.12"),
        (["3.10", "3.13"], None),
        ([], None),
    ],
)
def test_python_for_venv(found: list[str], chosen: str | None, tmp_path: Path) -> None:
    """An existing environment is activated, so only the function is run."""
    project, pythons = copied_project(tmp_path), tmp_path / "pythons"
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "activate").touch()
    parts = ("examples/requirements.txt", "setup.py")
    made_from = "".join((project / name).read_text() for name in parts)
    (project / ".venv" / "made-from.txt").write_text(made_from)

    pythons.mkdir()
    for version in found:
        info = f"import sys; sys.version_info = {tuple(map(int, version.split('.')))}"
        text = f'exec {sys.executable} -c "{info}; $2"'
        write_program(pythons / f"python{version}", text)
    result = in_bash(". examples/venv.sh && python_for_venv", pythons, project)
    if chosen:
        assert result.stdout == f"{chosen}\n", result.stderr
    else:
        assert result.returncode == 1
        assert result.stderr.startswith("no Python 3.11 or 3.12 on PATH")


@pytest.mark.parametrize("options", ["", "set -euo pipefail; "])
@pytest.mark.parametrize("failing", [None, "-m venv", "--requirement", "uninstall", "--editable"])
def test_the_environment_is_that_of_the_script(
    failing: str | None, options: str, tmp_path: Path
) -> None:
    """From another folder, in a shell with and without ``set -e``. A step that fails is the last
    one, and nothing is activated."""
    project, pythons, elsewhere = copied_project(tmp_path), tmp_path / "bin", tmp_path / "elsewhere"
    pythons.mkdir()
    elsewhere.mkdir()
    program = f"""echo "$*" >>{tmp_path}/called.txt
case "$*" in *"{failing}"*) exit 3 ;; esac
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    echo 'echo "activated in $PWD"' >"$3/bin/activate"
fi"""
    write_program(pythons / "python3.11", program)
    result = in_bash(
        f"{options}. ../project/examples/venv.sh", pythons, elsewhere, "mkdir", "cp", "grep"
    )
    calls = (tmp_path / "called.txt").read_text().splitlines()
    assert not list(elsewhere.iterdir())
    if failing is None:
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == f"activated in {elsewhere}"
        assert calls[-1].endswith("--editable .")
        made_from = (project / "examples" / "requirements.txt").read_text()
        made_from += (project / "setup.py").read_text()
        assert (project / ".venv" / "made-from.txt").read_text() == made_from
    else:
        assert result.returncode != 0 and "activated" not in result.stdout
        assert failing in calls[-1]
        assert not (project / ".venv" / "made-from.txt").exists()
