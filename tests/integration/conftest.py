"""What the tests of one running service share. A module that starts one defines `service`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from arkor_ray.client.client import Client
from tests.integration.stories import write_rows
from tests.servers.arkor import RunningService


@pytest.fixture(scope="module")
def client(service: RunningService) -> Iterator[Client]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file:// URL of a data set."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
