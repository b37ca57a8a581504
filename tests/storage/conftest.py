"""Stores to test: every one must behave the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from arkor_ray.storage.local import LocalStore
from arkor_ray.storage.object_store import ObjectStore
from arkor_ray.storage.retry import RetryPolicy
from arkor_ray.storage.s3 import S3Store
from tests.servers.s3 import S3Endpoint

OpenS3 = Callable[..., S3Store]


@pytest.fixture(params=["local", "moto", "ceph"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(backend: str, request: pytest.FixtureRequest, tmp_path: Path, open_s3: OpenS3) -> ObjectStore:
    """An empty store of each kind."""
    if backend == "local":
        return LocalStore(tmp_path / "store")
    return open_s3(request.getfixturevalue(f"{backend}_s3"))


@pytest.fixture
def open_s3(monkeypatch: pytest.MonkeyPatch) -> OpenS3:
    """Opens a store in a new bucket of a service, by the way of `url` when one is given."""

    def open_bucket(endpoint: S3Endpoint, *, url: str | None = None, retry: RetryPolicy | None = None) -> S3Store:
        for name, value in endpoint.environment.items():
            monkeypatch.setenv(name, value)
        # A prefix, so that every test also shows that keys are relative to it.
        return S3Store(endpoint.make_bucket(), "some/prefix", endpoint_url=url or endpoint.endpoint_url, retry=retry)

    return open_bucket
