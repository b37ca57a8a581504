"""Connections to PostgreSQL: to the server that takes writes, and to no other for long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError

from arkor_ray.db import postgres
from arkor_ray.db.session import DATABASE_AWAY, Database
from arkor_ray.db.tables import OrgRow
from arkor_ray.embedded import free_ports
from tests.db.databases import migrated_database


@pytest.fixture
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    yield from migrated_database("postgresql", request, tmp_path)


def connecting(db: Database, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What libpq is asked for by each connection from now on."""
    asked: list[dict[str, Any]] = []
    connect = db.engine.dialect.connect

    def watched(*args: Any, **parameters: Any) -> Any:
        asked.append(parameters)
        return connect(*args, **parameters)

    monkeypatch.setattr(db.engine.dialect, "connect", watched)
    return asked


def test_only_servers_that_take_writes_are_connected_to(db, monkeypatch) -> None:
    asked = connecting(db, monkeypatch)
    db.engine.connect().close()
    assert (asked[0]["target_session_attrs"], asked[0]["connect_timeout"]) == ("read-write", postgres.CONNECT_S)


def test_several_servers_that_do_not_answer_take_no_longer_than_one(db, monkeypatch) -> None:
    one, two = free_ports(2)
    with closing(with_query(db, host=f"127.0.0.1:{one},127.0.0.1:{two}".split(","))) as several:
        asked = connecting(several, monkeypatch)
        with pytest.raises(DATABASE_AWAY):
            several.engine.connect()
    assert 2 * asked[0]["connect_timeout"] <= postgres.CONNECT_S


def test_what_the_url_says_itself_goes_first(db, monkeypatch) -> None:
    with closing(with_query(db, target_session_attrs="any", connect_timeout="3")) as other:
        asked = connecting(other, monkeypatch)
        other.engine.connect().close()
    assert (asked[0]["target_session_attrs"], asked[0]["connect_timeout"]) == ("any", "3")


def test_a_write_that_a_server_refuses_as_read_only_is_worth_another_try_on_another_connection(db) -> None:
    before = backend(db)
    with pytest.raises(OperationalError, match="read-only") as raised, db.write() as session:
        session.execute(text("SET TRANSACTION READ ONLY"))
        session.add(OrgRow(slug="a", name="A"))
    assert isinstance(raised.value, DATABASE_AWAY) and raised.value.connection_invalidated
    assert backend(db) != before


def test_a_transaction_that_the_server_ended_because_nobody_went_on_with_it_is_worth_another_try(db) -> None:
    with pytest.raises(DATABASE_AWAY, match="timeout") as raised, db.write() as session:
        session.execute(text("SET idle_in_transaction_session_timeout = 20"))
        time.sleep(0.5)
        session.execute(text("SELECT 1"))
    assert raised.value.connection_invalidated


def test_a_read_takes_another_connection_where_the_server_has_become_read_only(db) -> None:
    before = backend(db)
    assert backend(db) == before
    with db.engine.connect() as connection:
        connection.execute(text("SET SESSION default_transaction_read_only = on"))
        connection.commit()
    assert backend(db) != before


def test_the_server_that_took_the_last_connection_is_asked_first(db, monkeypatch) -> None:
    there, (closed,) = make_url(db.url), free_ports(1)
    with closing(with_query(db, host=f"{there.host},{there.host}", port=f"{closed},{there.port or 5432}")) as several:
        asked = connecting(several, monkeypatch)
        with several.engine.connect(), several.engine.connect():
            pass
    assert [each["port"] for each in asked] == [f"{closed},{there.port}", f"{there.port},{closed}"]


def with_query(db: Database, **parameters: str | list[str]) -> Database:
    return Database(make_url(db.url).update_query_dict(parameters).render_as_string(hide_password=False))


def backend(db: Database) -> int:
    with db.read() as session:
        return session.execute(text("SELECT pg_backend_pid()")).scalar_one()


def test_locks_of_somebody_who_has_vanished_in_a_transaction_are_given_up(db, monkeypatch) -> None:
    monkeypatch.setitem(postgres.SERVERS_LIMITS, "idle_in_transaction_session_timeout", "1s")
    with db.write() as session:
        session.add(OrgRow(id="o", slug="o", name="before"))
    rename = text("UPDATE orgs SET name = :name WHERE id = 'o'")
    with closing(Database(db.url)) as vanished, closing(Database(db.url)) as other:
        standing_still = vanished.engine.connect()
        standing_still.execute(rename, {"name": "never"})
        with other.write() as session:
            session.execute(rename, {"name": "after"})
        with pytest.raises(DATABASE_AWAY):
            standing_still.commit()
        standing_still.invalidate()
        with db.read() as session:
            assert session.scalar(text("SELECT name FROM orgs")) == "after"


def test_a_lock_that_somebody_holds_is_waited_for_and_then_counts_as_a_database_that_is_away(db, monkeypatch) -> None:
    monkeypatch.setitem(postgres.SERVERS_LIMITS, "lock_timeout", "200ms")
    rename = text("UPDATE orgs SET name = 'after'")
    with db.write() as session:
        session.add(OrgRow(id="o", slug="o", name="before"))
    with closing(Database(db.url)) as patient, db.write() as session:
        session.execute(rename)
        with pytest.raises(DATABASE_AWAY, match="lock timeout"), patient.write() as late:
            late.execute(rename)
    with closing(Database(db.url)) as again, again.read() as session:
        session.rollback()  # takes nothing back of what the connection was told
        assert session.scalar(text("SHOW lock_timeout")) == "200ms"
