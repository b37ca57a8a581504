"""Fixtures that every part of the suite may ask for. Real servers start once a session, and only when a test asks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from arkor_ray.telemetry import metrics, tracing
from tests.servers.ceph import running_ceph
from tests.servers.postgres import running_postgres
from tests.servers.postgres_pair import PostgresPair, running_pair
from tests.servers.processes import ServerMissingError, required
from tests.servers.s3 import S3Endpoint, running_moto
from tests.telemetry.recorded import Recorded

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


@pytest.fixture(scope="session")
def ceph_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    """A real S3 service: the one that ARKOR_RAY_TEST_S3 names, else a Ceph of our own."""
    given = os.environ.get("ARKOR_RAY_TEST_S3")
    if given:
        yield S3Endpoint.from_json(given)
        return
    try:
        with running_ceph(tmp_path_factory.mktemp("ceph")) as endpoint:
            yield endpoint
    except ServerMissingError as error:
        _skip_or_fail(error)


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[S3Endpoint]:
    """An imitation of S3 in this process."""
    with running_moto() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def s3_endpoint(request: pytest.FixtureRequest) -> S3Endpoint:
    """The best S3 service to be had: a real one, else moto's (`.real` tells)."""
    try:
        return request.getfixturevalue("ceph_s3")
    except pytest.skip.Exception:
        return request.getfixturevalue("moto_s3")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real, empty PostgreSQL: the one that ARKOR_RAY_TEST_POSTGRES_URL names, else one of our own."""
    given = os.environ.get("ARKOR_RAY_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    try:
        with TemporaryDirectory(prefix="postgres-") as folder, running_postgres(Path(folder)) as url:
            yield url
    except ServerMissingError as error:
        _skip_or_fail(error)


@pytest.fixture
def postgres_pair() -> Iterator[PostgresPair]:
    """A primary and its standby, for a test that ends one of them."""
    try:
        with TemporaryDirectory(prefix="postgres-") as folder, running_pair(Path(folder)) as pair:
            yield pair
    except ServerMissingError as error:
        _skip_or_fail(error)


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    """Where the metrics of this process go during the test."""
    made = Recorded()
    metrics.export_to(made)
    yield made
    metrics.export_to(None)


@pytest.fixture
def spans() -> Iterator[Callable[[], Sequence[ReadableSpan]]]:
    """Traces are on; called, it gives the spans that have ended, in that order."""
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    tracing.export_to(kept)

    def ended() -> Sequence[ReadableSpan]:
        tracing.flush()
        return kept.get_finished_spans()

    yield ended
    tracing.export_to(None)


def _skip_or_fail(error: ServerMissingError) -> None:
    if required():
        pytest.fail(f"CI_REQUIRE_SERVERS=1, but {error}")
    pytest.skip(str(error))
