"""Imports the scripts of examples/data."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.examples.data.made import SCRIPTS

MODULES = (
    *("archives", "clean", "corpus", "deduplicate", "encode", "fetch", "files", "folder"),
    *("gpt2_bpe", "laptop", "ngrams", "readers", "splits", "tables"),
)


@pytest.fixture(scope="module")
def data() -> Iterator[SimpleNamespace]:
    """Import the scripts. examples/ is not a package, so they find each other in their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name in MODULES:
            del sys.modules[name]
