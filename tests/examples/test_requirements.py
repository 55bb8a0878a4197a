"""The environment that examples/venv.sh makes."""

import importlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = {"ve-fairseq": {"torchaudio"}}
"""Package -> what it requires and does without. It is installed without its dependencies."""
BUILT_WITH = {"torch": {"setuptools"}}
"""Package -> what it requires of the tools that make an environment."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> list[str]:
    lines = (ROOT / "examples" / "requirements.txt").read_text().splitlines()
    return [canonical(line.partition("==")[0]) for line in lines if "==" in line]


def required_by(package: str) -> set[str]:
    """What a package needs on this machine, its extras and a GPU's libraries left out."""
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
