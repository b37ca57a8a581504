"""Databases for tests: an SQLite file or a PostgreSQL database of one's own, migrated once and then copied."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

import pytest
from sqlalchemy import Connection, NullPool, create_engine, make_url, text

from arkor_ray.db.session import Database

both = pytest.mark.parametrize("db", ["sqlite", "postgresql"], indirect=True)


def empty_database_url(kind: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """The URL of a database without tables, gone when the generator ends."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'arkor.db'}"
        return
    with _postgres_database(request.getfixturevalue("postgres_url"), template="template1") as url:
        yield url


def migrated_database(kind: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[Database]:
    """A database with all tables and no rows."""
    if kind == "sqlite":
        shutil.copyfile(
            _sqlite_template(request.getfixturevalue("tmp_path_factory").getbasetemp()), folder / "arkor.db"
        )
        with closing(Database(f"sqlite:///{folder / 'arkor.db'}")) as database:
            yield database
        return
    server_url = request.getfixturevalue("postgres_url")
    with (
        _postgres_database(server_url, template=_postgres_template(server_url)) as url,
        closing(Database(url)) as database,
    ):
        yield database


@cache
def _sqlite_template(session_folder: Path) -> Path:
    path = session_folder / "template.db"
    with closing(Database(f"sqlite:///{path}")) as database:
        database.migrate()
    return path  # the last one to close a file moves its write-ahead log into it


@cache
def _postgres_template(server_url: str) -> str:
    name = f"template_{uuid.uuid4().hex}"
    with _administration(server_url) as server:
        server.execute(text(f"CREATE DATABASE {name}"))
    with closing(Database(_url(server_url, name))) as database:
        database.migrate()
    return name


@contextmanager
def _postgres_database(server_url: str, template: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    with _administration(server_url) as server:
        server.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
        yield _url(server_url, name)
        server.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@contextmanager
def _administration(server_url: str) -> Iterator[Connection]:
    engine = create_engine(
        make_url(server_url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT", poolclass=NullPool
    )
    with engine.connect() as connection:
        yield connection


def _url(server_url: str, name: str) -> str:
    return make_url(server_url).set(database=name).render_as_string(hide_password=False)
