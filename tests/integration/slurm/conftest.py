"""A Slurm cluster for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a cluster, for all tests of a worker."""
    if names := missing():
        pytest.skip(
            f"Slurm is not installed: no {', '.join(names)} (slurm-wlm and munge in Debian)"
        )
    with Cluster(tmp_path_factory.mktemp("cluster")).running() as cluster:
        yield cluster
