"""Fixtures that notice if a payload does anything."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patches.payloads import Watch


@pytest.fixture(scope="session")
def watch() -> Watch:
    """Make one for all tests, as an audit hook stays until the process ends."""
    return Watch()


@pytest.fixture
def witness(tmp_path: Path, watch: Watch) -> Iterator[Path]:
    """Return a file that no payload may make or open."""
    path = tmp_path / "witness"
    watch.opened.clear()
    watch.active = True
    yield path
    watch.active = False
    assert not path.exists()
    assert not [opened for opened in watch.opened if "witness" in opened]
