"""Imports the scripts of examples/benchmark, and restores the state that they change."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from fairseq.logging import metrics

SCRIPTS = Path(__file__).parents[3] / "examples" / "benchmark"
NAMES = (
    *("timing", "layer", "memory", "selection", "train_step", "decode", "scaling", "peers"),
    *("tables", "processes", "report"),
)


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """Import the scripts. They import each other by name, as when they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        before = {name: sys.modules.pop(name, None) for name in NAMES}
        yield {name: importlib.import_module(name) for name in NAMES}
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Restore the state that scripts change, as each script normally has its own process."""
    level = logging.getLogger().level
    metrics.reset()
    yield
    metrics.reset()
    logging.getLogger().setLevel(level)


@pytest.fixture
def timing(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["timing"]
