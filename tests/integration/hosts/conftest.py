"""The hosts that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.integration.hosts.network import Host, reason_to_skip, two_hosts


@pytest.fixture(scope="session")
def can_have_hosts() -> None:
    """Skip the tests where namespaces may not be made."""
    if reason := reason_to_skip():
        pytest.skip(reason)


@pytest.fixture
def hosts(can_have_hosts: None, quick_start: None) -> Iterator[list[Host]]:
    """Make two hosts. Their processes end with the test."""
    with two_hosts() as hosts:
        yield hosts
