"""Every test that takes `db` runs twice: on SQLite and on a real PostgreSQL, each time in an empty database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from arkor_ray.db.session import Database
from tests.db.databases import empty_database_url, migrated_database


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without tables."""
    yield from empty_database_url(request.param, request, tmp_path)


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A migrated database without rows."""
    yield from migrated_database(request.param, request, tmp_path)
