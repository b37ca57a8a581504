"""The queue before the table: it is bounded, outlives a database that is away, and loses only what it must."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from arkor_ray.api import run_store
from arkor_ray.api.run_store import RunStore
from arkor_ray.db import endpoints
from arkor_ray.db.session import Database
from arkor_ray.db.tables import EndpointRow, RunRow
from tests.db.endpoint_rows import publish, run_of

PATIENCE_S = 20.0


class FaultyDatabase:
    """The database behind a connection that does what it is told: `block`, `cut`, `mend`."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._open = threading.Event()
        self._open.set()
        self._cut = False
        self.tried = threading.Semaphore(0)

    def block(self) -> None:
        self._open.clear()

    def cut(self) -> None:
        self._cut = True

    def mend(self) -> None:
        self._cut = False
        self._open.set()

    @contextmanager
    def write(self) -> Iterator[Session]:
        self.tried.release()
        self._open.wait(PATIENCE_S)
        if self._cut:
            raise OperationalError("INSERT", {}, Exception("server closed the connection"))
        with self._db.write() as session:
            yield session

    def wait_for_a_try(self) -> None:
        assert self.tried.acquire(timeout=PATIENCE_S)


@pytest.fixture
def faulty(db: Database) -> Iterator[FaultyDatabase]:
    made = FaultyDatabase(db)
    yield made
    made.mend()  # lets a thread that is still blocked go


@pytest.fixture
def endpoint(db: Database) -> EndpointRow:
    return publish(db, "one")


@pytest.fixture
def runs(faulty: FaultyDatabase, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    monkeypatch.setattr(run_store, "LINGER_S", 0.0)
    monkeypatch.setattr(run_store, "RETRY_S", 0.005)
    database: Any = faulty
    return RunStore(database)


def stored(db: Database) -> set[str]:
    with db.read() as session:
        return set(session.scalars(select(RunRow.id)))


def test_all_that_was_kept_is_written_when_it_closes(db: Database, endpoint: EndpointRow, runs: RunStore) -> None:
    kept = [run_of(endpoint) for _ in range(2 * run_store.BATCH + 1)]
    for run in kept:
        runs.keep(run, 1)
    runs.close()
    assert stored(db) == {run.id for run in kept} and runs.dropped == 0


def test_store_that_never_got_a_run_closes(runs: RunStore) -> None:
    runs.close()
    assert runs.dropped == 0


@pytest.mark.parametrize(("limit", "value"), [("MAX_WAITING", 3), ("MAX_WAITING_BYTES", 30)])
def test_what_comes_while_the_database_blocks_is_bounded_and_counted(
    db: Database, endpoint: EndpointRow, runs: RunStore, faulty: FaultyDatabase, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, limit: str, value: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(run_store, limit, value)
    faulty.block()
    kept = [run_of(endpoint) for _ in range(10)]
    for run in kept:
        runs.keep(run, 10)
    assert runs.dropped == 7 and "dropped" in caplog.text
    faulty.mend()
    runs.close()
    assert stored(db) == {run.id for run in kept[:3]}
    assert "7 runs were not stored" in caplog.text


def test_there_is_room_again_once_runs_are_written(
    db: Database, endpoint: EndpointRow, runs: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_store, "MAX_WAITING_BYTES", 10)
    kept = [run_of(endpoint) for _ in range(3)]
    for run in kept:
        runs.keep(run, 10)
        while run.id not in stored(db) or runs._held_bytes:
            threading.Event().wait(0.005)
    runs.close()
    assert runs.dropped == 0


def test_database_that_comes_back_loses_nothing(
    db: Database, endpoint: EndpointRow, runs: RunStore, faulty: FaultyDatabase
) -> None:
    faulty.cut()
    kept = [run_of(endpoint) for _ in range(3)]
    for run in kept:
        runs.keep(run, 1)
    for _ in range(3):
        faulty.wait_for_a_try()
    faulty.mend()
    runs.close()
    assert stored(db) == {run.id for run in kept} and runs.dropped == 0


def test_end_of_the_process_does_not_wait_for_a_database_that_is_away(
    endpoint: EndpointRow, runs: RunStore, faulty: FaultyDatabase
) -> None:
    faulty.cut()
    runs.keep(run_of(endpoint), 1)
    faulty.wait_for_a_try()
    runs.close()
    assert runs.dropped == 1


def test_end_of_the_process_does_not_wait_for_one_that_blocks(
    endpoint: EndpointRow, runs: RunStore, faulty: FaultyDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_store, "CLOSE_S", 0.01)
    faulty.block()
    runs.keep(run_of(endpoint), 1)
    faulty.wait_for_a_try()
    runs.close()
    assert runs.dropped == 1


def test_run_of_a_deleted_endpoint_costs_the_others_nothing(
    db: Database, endpoint: EndpointRow, runs: RunStore, faulty: FaultyDatabase
) -> None:
    gone = publish(db, "gone")
    faulty.block()
    kept = [run_of(endpoint), run_of(gone), run_of(endpoint)]
    for run in kept:
        runs.keep(run, 1)
    with db.write() as session:
        endpoints.delete(session, gone.project_id, gone.id)
    faulty.mend()
    runs.close()
    assert stored(db) == {kept[0].id, kept[2].id} and runs.dropped == 0
