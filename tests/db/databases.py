"""Databases for tests: an SQLite file or a PostgreSQL database of one's own, migrated once and then copied."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from sqlalchemy import create_engine, make_url, text

from arkor_ray.db.session import Database

both = pytest.mark.parametrize("db", ["sqlite", "postgresql"], indirect=True)


def empty_database_url(kind: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """The URL of a database without tables, gone when the generator ends."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'arkor.db'}"
        return
    with _postgres_database(request.getfixturevalue("postgres_url")) as url:
        yield url


def migrated_database(kind: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[Database]:
    """A database with all tables and no rows."""
    if kind == "sqlite":
        path = folder / "arkor.db"
        shutil.copyfile(_sqlite_template(), path)
        database = Database(f"sqlite:///{path}")
        yield database
        database.close()
        return
    with _postgres_database(request.getfixturevalue("postgres_url")) as url:
        database = Database(url)
        database.migrate()
        yield database
        database.close()


@cache
def _sqlite_template() -> Path:
    path = Path(mkdtemp(prefix="arkor-test-db-")) / "template.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.close()  # the last one to close a file moves its write-ahead log into it
    return path


@contextmanager
def _postgres_database(server_url: str) -> Iterator[str]:
    server = make_url(server_url).set(drivername="postgresql+psycopg")
    name = f"test_{uuid.uuid4().hex}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    try:
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        yield server.set(drivername="postgresql", database=name).render_as_string(hide_password=False)
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        admin.dispose()
