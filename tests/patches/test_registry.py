"""The declaration of patches, and properties that all patches have."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.data import TokenBlockDataset
from fairseq_cli import eval_lm as eval_command
from fairseq_cli import generate as generate_command

from fairseq_sffn import patches
from fairseq_sffn.patches import PATCHES, numpy_compat
from fairseq_sffn.patches.registry import MENDS_FAIRSEQ, MISSING, NEEDED, Patch, fingerprint, patch

MOST = 25


def test_each_target_has_one_patch() -> None:
    targets = [each.target for each in PATCHES]
    assert len(set(targets)) == len(targets) <= MOST
    owners = [each.owner() for each in PATCHES]
    assert len({(id(owner), name) for owner, name in owners}) == len(owners)


@pytest.mark.parametrize("each", PATCHES, ids=lambda each: each.target)
def test_a_patch_is_declared(each: Patch) -> None:
    assert each.kind in (NEEDED, MENDS_FAIRSEQ)
    assert all(text.endswith(".") and "\n" not in text for text in (each.why, each.until))


@pytest.mark.parametrize("each", PATCHES, ids=lambda each: each.target)
def test_a_patch_was_written_for_the_fairseq_that_is_installed(each: Patch) -> None:
    assert each.found() in each.written_for


def test_applying_twice_changes_nothing() -> None:
    before = [each.current() for each in PATCHES]
    assert all(each.is_applied() for each in PATCHES)
    patches.apply()
    assert all(each.current() is it for each, it in zip(PATCHES, before, strict=True))


IN_REVERSE = """
import json, sys
import fairseq.tasks, fairseq_cli.train
from fairseq_sffn.patches import PATCHES
assert not any(each.is_applied() for each in PATCHES)
originals = [each.original() for each in PATCHES]
ORDERED(PATCHES)
print(json.dumps([
    [each.target, each.is_applied(), each.original() is original, each.found()]
    for each, original in zip(PATCHES, originals)
]))
"""


@pytest.mark.parametrize("ordered", ["list", "reversed"])
def test_order_does_not_matter(ordered: str) -> None:
    """Each patch wraps fairseq's own function, not the result of another patch."""
    # The imports of `import fairseq_sffn.patches` apply nothing.
    script = IN_REVERSE.replace("ORDERED(PATCHES)", f"[p.apply() for p in {ordered}(PATCHES)]")
    script = script.replace(
        "import fairseq.tasks", "import fairseq_sffn.memory; import fairseq.tasks"
    )
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout
    found = json.loads(printed.splitlines()[-1])
    assert found == [[each.target, True, True, each.found()] for each in PATCHES]


# One patch


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Make a module to patch."""
    module: Any = ModuleType("library")

    class Thing:
        def method(self) -> str:
            return "original"

        @staticmethod
        def static() -> str:
            return "original"

    module.Thing = Thing
    monkeypatch.setitem(sys.modules, "library", module)
    return module


def declared(target: str, *written_for: str) -> Patch:
    @patch(target, why="A.", until="B.", kind=MENDS_FAIRSEQ, written_for=written_for)
    def replace(original: Any) -> Any:
        return lambda *args: f"patched {original(*args)}"

    return replace


@pytest.mark.parametrize("name", ["method", "static"])
def test_a_method_is_replaced_once(name: str, library: Any) -> None:
    original = getattr(library.Thing, name)
    each = declared(f"library:Thing.{name}", str(fingerprint(original)))
    for _ in range(2):
        each.apply()
        assert getattr(library.Thing(), name)() == "patched original"
    assert each.is_applied() and each.original() is original and each.fits()


def test_a_changed_original_warns_in_one_line(
    library: Any, caplog: pytest.LogCaptureFixture
) -> None:
    each = declared("library:Thing.method", "01234567")
    with caplog.at_level(logging.WARNING):
        each.apply()
        each.apply()
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith("library:Thing.method: its source (") and "\n" not in line
    assert "fairseq-sffn patches" in line
    assert library.Thing().method() == "patched original" and not each.fits()


def test_a_target_that_has_gone_is_left_out(library: Any, caplog: pytest.LogCaptureFixture) -> None:
    each = declared("library:Thing.gone", "01234567")
    with caplog.at_level(logging.WARNING):
        each.apply()
    assert [record.getMessage() for record in caplog.records] == [
        "library:Thing.gone: is not there; see fairseq-sffn patches"
    ]
    assert not hasattr(library.Thing, "gone") and not each.fits()


def test_white_space_does_not_count() -> None:
    def function() -> int:
        return 1

    def other() -> int:
        return 2

    assert fingerprint(function) == fingerprint(function) != fingerprint(other)
    assert fingerprint(None) == MISSING and fingerprint(print) is None


def test_a_command_run_as_a_module_is_patched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m fairseq_cli.eval_lm`` runs another copy of the module."""
    copy: Any = ModuleType("__main__")
    other = ModuleType("__main__")
    copy.__spec__, other.__spec__ = eval_command.__spec__, generate_command.__spec__
    monkeypatch.setattr(eval_command, "cli_main", eval_command.cli_main)
    each = declared("fairseq_cli.eval_lm:cli_main", str(fingerprint(eval_command.cli_main)))
    monkeypatch.setitem(sys.modules, "__main__", copy)
    each.apply()
    assert copy.cli_main is eval_command.cli_main is each.current()
    monkeypatch.undo()
    monkeypatch.setattr(eval_command, "cli_main", each.original())
    monkeypatch.setitem(sys.modules, "__main__", other)
    each.apply()
    assert not hasattr(other, "cli_main")


# NumPy


def test_numpy_compat(monkeypatch: pytest.MonkeyPatch) -> None:
    def sentences() -> TokenBlockDataset:
        tokens = [torch.tensor([4, 5, 2]), torch.tensor([6, 2])]
        sizes = np.array([3, 2])
        return TokenBlockDataset(tokens, sizes, block_size=None, pad=1, eos=2, break_mode="eos")

    assert len(sentences()) == 2
    monkeypatch.delattr(np, "compat")
    with pytest.raises(AttributeError, match="compat"):
        sentences()
    numpy_compat.compat.apply()
    assert len(sentences()) == 2


def test_an_old_numpy_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = SimpleNamespace(long=int)
    monkeypatch.setattr(np, "compat", own)
    numpy_compat.compat.apply()
    assert np.compat is own and not caplog.records
