"""The event log's promises, on a real database."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import select

from arkor_ray.db import jobs
from arkor_ray.db.session import Database
from arkor_ray.db.tables import Base, EventRow, JobRow
from arkor_ray.errors import GoneError
from arkor_ray.events import publisher
from arkor_ray.events.publisher import JobEndedError, NewEvent, StaleAttemptError
from arkor_ray.events.stream import read_events
from arkor_ray.schemas import event
from arkor_ray.schemas.job import JobStatus
from tests.db.factories import create_job


@pytest.fixture(params=["sqlite", "postgres"])
def db(request, tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    database = Database(url)
    Base.metadata.drop_all(database.engine)
    Base.metadata.create_all(database.engine)
    yield database
    Base.metadata.drop_all(database.engine)
    database.close()


@pytest.fixture
def job_id(db):
    return create_job(db)


def log(db, job_id, step, **kwargs):
    with db.write() as session:
        return publisher.append(session, job_id, event.LOG, {"step": step, "loss": 1.5}, key=f"log:{step}", **kwargs)


def events(db, job_id):
    with db.read() as session:
        return read_events(session, job_id)


def test_numbers_have_no_holes_and_no_repeats_under_concurrent_writers(db, job_id):
    def write(worker: int) -> None:
        for step in range(20):
            log(db, job_id, 1000 * worker + step)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [e.id for e in events(db, job_id)] == list(range(1, 81))


def test_the_same_thing_reported_again_changes_nothing(db, job_id):
    assert [log(db, job_id, 1), log(db, job_id, 1), log(db, job_id, 2)] == [1, None, 2]
    with db.write() as session:
        again = [NewEvent(event.LOG, "log:2"), NewEvent(event.LOG, "log:3"), NewEvent(event.LOG, "log:3")]
        assert publisher.append_all(session, job_id, again) == [None, 3, None]


def test_a_transaction_that_fails_leaves_no_hole(db, job_id):
    log(db, job_id, 1)
    with pytest.raises(RuntimeError), db.write() as session:
        publisher.append(session, job_id, event.LOG, {"step": 2}, key="log:2")
        raise RuntimeError("the process dies here")
    assert log(db, job_id, 3) == 2


def test_started_moves_the_job_to_running_once(db, job_id):
    with db.write() as session:
        assert publisher.start(session, job_id, {"metadata": {}}) == 1
        started = session.get(JobRow, job_id).started_at
    with db.write() as session:
        assert publisher.start(session, job_id, {"metadata": {}}) is None
        row = session.get(JobRow, job_id)
        assert (row.status, row.started_at) == ("running", started)


def test_exactly_one_terminal_event_and_nothing_after_it(db, job_id):
    log(db, job_id, 1)
    with db.write() as session:
        assert publisher.finish(session, job_id, JobStatus.FAILED, type=event.FAILED, fields={"error": "x"}, error="x")
    with db.write() as session:
        assert not publisher.finish(session, job_id, JobStatus.COMPLETED, type=event.COMPLETED, fields={})
    with pytest.raises(JobEndedError):
        log(db, job_id, 2)
    assert [e.type for e in events(db, job_id)] == [event.LOG, event.FAILED]
    with db.read() as session:
        row = session.scalar(select(JobRow))
        assert (row.status, row.error) == ("failed", "x")
        assert row.completed_at is not None
        assert row.dataset_token is None


def test_a_writer_of_another_attempt_is_refused(db, job_id):
    with db.write() as session:
        assert jobs.claim_attempt(session, job_id, attempt=1, submission_id="s-1")
    assert log(db, job_id, 1, attempt=1) == 1
    with pytest.raises(StaleAttemptError):
        log(db, job_id, 2, attempt=2)


def test_a_job_that_does_not_exist_is_gone(db, job_id):
    with pytest.raises(GoneError):
        log(db, "00000000-0000-0000-0000-000000000000", 1)


def test_numbers_that_are_no_json_become_null(db, job_id):
    with db.write() as session:
        fields = {"step": 1, "loss": float("nan"), "nested": [float("inf"), {"x": 2.0}]}
        publisher.append(session, job_id, event.LOG, fields, key="log:1")
    data = events(db, job_id)[0].data
    assert (data["loss"], data["nested"]) == (None, [None, {"x": 2.0}])
    assert data["type"] == event.LOG
    assert data["jobId"] == job_id
    assert data["timestamp"].endswith("Z")


def test_texts_that_no_database_stores_are_told_with_marks_in_their_place(db, job_id):
    said = "the row 'a\x00b' ends in half a pair \udc80"
    with db.write() as session:
        publisher.append(session, job_id, "dataset.preflight", {"reasons": [{"\x00": said}]}, key="dataset.preflight:")
        publisher.finish(session, job_id, JobStatus.FAILED, type=event.FAILED, fields={"error": said}, error=said)
    stored = "the row 'a\ufffdb' ends in half a pair \ufffd"
    preflight, failed = events(db, job_id)
    assert (preflight.data["reasons"], failed.data["error"]) == ([{"\ufffd": stored}], stored)
    with db.read() as session:
        assert session.get(JobRow, job_id).error == stored


def test_events_are_stored_once_per_key_also_in_the_database(db, job_id):
    log(db, job_id, 1)
    with db.read() as session:
        assert session.scalars(select(EventRow.key)).all() == ["log:1"]
