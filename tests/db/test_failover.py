"""A primary and its standby: what was acknowledged stays, and whoever writes or reads goes on by itself."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from arkor_ray.db import jobs
from arkor_ray.db.session import Database
from arkor_ray.doctor.database import check_database
from arkor_ray.doctor.findings import Status
from arkor_ray.events.stream import read_events
from arkor_ray.schemas import event
from arkor_ray.training.recorder import Recorder
from tests.db.factories import create_job
from tests.servers.postgres_pair import PostgresPair

LIMIT_S = 60  # of a machine that has much else to do
WAITING = "The database does not take events"  # what the recorder logs at each try


@pytest.fixture
def db(postgres_pair: PostgresPair) -> Iterator[Database]:
    """A migrated one, named by both servers."""
    with closing(Database(postgres_pair.url)) as database:
        database.migrate()
        yield database


@pytest.fixture
def writer(db: Database, tmp_path, monkeypatch) -> Iterator[Writer]:
    monkeypatch.setenv("ARKOR_RAY_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ARKOR_RAY_DATABASE_URL", db.url)
    job_id = create_job(db)
    with db.write() as session:
        jobs.claim_attempt(session, job_id, attempt=1, submission_id="s")
    writer = Writer(job_id)
    yield writer
    writer.stop()


class Writer:
    """A job's recorder, told one step after the other; `acknowledged` are those of which it said that they are kept."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.acknowledged: list[int] = []
        self._enough = threading.Event()
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def write_some(self, count: int = 20) -> None:
        """Returns once so many more are acknowledged."""
        wanted = len(self.acknowledged) + count
        until(lambda: len(self.acknowledged) >= wanted or bool(self._failures))
        assert not self._failures

    def stop(self) -> None:
        """Returns once what it was told is acknowledged."""
        self._enough.set()
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            asyncio.run(self._write())
        except Exception as failure:
            self._failures.append(failure)

    async def _write(self) -> None:
        recorder = Recorder(self.job_id, 1)
        await recorder.started({})
        while not self._enough.is_set():
            step = len(self.acknowledged) + 1
            if await recorder.tell([("log", ({"step": step, "loss": 1.0},))]):
                self.acknowledged.append(step)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "nothing has happened"
        time.sleep(0.01)


def steps(db: Database, job_id: str) -> list[int]:
    with db.read() as session:
        return [e.step or 0 for e in read_events(session, job_id, limit=None) if e.type == event.LOG]


def test_a_primary_dies_and_its_standby_is_promoted(db: Database, postgres_pair: PostgresPair, writer: Writer) -> None:
    writer.write_some()
    postgres_pair.primary.kill()
    postgres_pair.promote()
    writer.write_some()
    writer.stop()
    # None is lost, none is there twice, and they are in order.
    assert steps(db, writer.job_id) == writer.acknowledged == list(range(1, len(writer.acknowledged) + 1))


def test_a_primary_that_takes_no_writes_is_waited_for_and_left_for_one_that_does(
    db: Database, postgres_pair: PostgresPair, writer: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    writer.write_some()
    postgres_pair.set_primary_aside()
    until(lambda: WAITING in caplog.text)
    postgres_pair.take_primary_back()
    writer.write_some()

    assert steps(db, writer.job_id)  # by a connection that stays, to a server that would go on answering
    caplog.clear()
    postgres_pair.set_primary_aside()
    until(lambda: WAITING in caplog.text)
    postgres_pair.promote()
    writer.write_some()
    writer.stop()
    assert steps(db, writer.job_id) == writer.acknowledged == list(range(1, len(writer.acknowledged) + 1))


def test_doctor_says_when_what_is_named_takes_no_writes(db: Database, postgres_pair: PostgresPair) -> None:
    primary, standby = postgres_pair.primary, postgres_pair.standby
    assert not [found for found in check_database(db.url) if found.status is not Status.OK]
    for url in (standby.url, f"{standby.url}?target_session_attrs=read-write"):
        (found,) = check_database(url)
        assert found.status is Status.FAIL and f"{standby.address} is a standby" in found.found
        assert "HOST1:5432,HOST2:5432" in found.remedy and "pg_promote" in found.remedy
    postgres_pair.set_primary_aside()
    (found,) = check_database(db.url)
    assert found.status is Status.FAIL and f"{primary.address} is read-only" in found.found
    assert "default_transaction_read_only" in found.remedy
