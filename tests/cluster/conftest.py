"""A cluster of several hosts for the tests of one module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from arkor_ray.demo.testing import make_tiny_model
from tests.integration.stories import write_rows
from tests.servers.hosts import NotPermittedError
from tests.servers.processes import ServerMissingError, required
from tests.servers.ray_hosts import RayHosts, running_cluster, start_service


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    """A service on a fault tolerant cluster; the module's tests stand on its clients' host."""
    tiny = make_tiny_model(tmp_path_factory.mktemp("tiny"), family="llama", hidden=64, layers=4)
    keep = os.environ.get("ARKOR_RAY_TEST_LOGS")
    try:
        with running_cluster({"tiny": tiny}, keep=Path(keep) if keep else None) as running:
            start_service(running, base_model="tiny")
            yield running
    except NotPermittedError as error:
        pytest.skip(str(error))
    except ServerMissingError as error:
        if required():
            pytest.fail(f"CI_REQUIRE_SERVERS=1, but {error}")
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def client(cluster):
    with cluster.client() as client:
        yield client


@pytest.fixture(scope="module")
def rows(cluster) -> str:
    """The file:// URL of a data set that every node can read."""
    return write_rows(cluster.folder / "rows.jsonl")
