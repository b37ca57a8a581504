"""What the controller asks for twice a second, and the limit of unfinished jobs, on both databases."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import select
from sqlalchemy.exc import InvalidRequestError

from arkor_ray.db import jobs
from arkor_ray.db.session import Database
from arkor_ray.db.tables import JobRow, ProjectRow
from arkor_ray.errors import RateLimitError
from arkor_ray.jobs import service
from arkor_ray.jobs.admission import AcceptedJob
from arkor_ray.schemas.base import utcnow
from tests.db.factories import create_job


def launch(db: Database, job_id: str, attempt: int = 1) -> None:
    with db.write() as session:
        assert jobs.claim_attempt(session, job_id, attempt=attempt, submission_id=f"{job_id}-{attempt}")


def lose(db: Database, job_id: str, *, retry_in: float) -> None:
    """The first attempt."""
    retry_at = utcnow() + timedelta(seconds=retry_in)
    with db.write() as session:
        jobs.plan_retry(session, job_id, attempt=1, retry_at=retry_at, retries=1, forgotten=0, lost_at_step=None)


def set_status(db: Database, job_id: str, status: str) -> None:
    with db.write() as session:
        session.get_one(JobRow, job_id).status = status


def found(db: Database, limit: int = 10) -> tuple[list[str], list[str]]:
    """The ids of launched jobs, and of those to be launched."""
    with db.read() as session:
        waiting = jobs.to_launch(session, utcnow(), limit)
        return [job.id for job in jobs.launched(session)], [job.id for job in waiting]


def test_jobs_to_launch_are_the_oldest_whose_time_has_come(db: Database) -> None:
    lost, due, running, *new = (create_job(db) for _ in range(6))
    for job_id in (lost, due, running):
        launch(db, job_id)
    lose(db, lost, retry_in=60)
    lose(db, due, retry_in=-1)
    assert found(db) == ([running], [due, *new])
    assert found(db, limit=2) == ([running], [due, new[0]])


def test_an_ended_job_counts_as_launched_until_its_submission_has_ended(db: Database) -> None:
    never, ended, waiting_for_a_retry = (create_job(db) for _ in range(3))
    for job_id in (ended, waiting_for_a_retry):
        launch(db, job_id)
    lose(db, waiting_for_a_retry, retry_in=-1)
    for job_id in (never, ended, waiting_for_a_retry):
        set_status(db, job_id, "cancelled")
    assert found(db) == ([ended, waiting_for_a_retry], [])
    with db.write() as session:
        for job_id in (ended, waiting_for_a_retry):
            jobs.mark_stopped(session, job_id)
    assert found(db) == ([], [])


def test_the_controller_reads_the_config_of_a_job_that_it_launches_and_of_no_other(db: Database) -> None:
    launched, waiting = create_job(db), create_job(db, config={"model": "tiny"})
    launch(db, launched)
    statements: list[str] = []
    sqlalchemy_event.listen(db.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    with db.read() as session:
        rows = [*jobs.launched(session), *jobs.to_launch(session, utcnow(), 1)]
        assert len(rows) == 2 and not any("config" in statement for statement in statements)
        with pytest.raises(InvalidRequestError, match="raiseload"):
            _ = rows[1].config
        assert jobs.config_of(session, waiting) == {"model": "tiny"}


def test_the_oldest_queued_job_is_found_among_those_that_run(db: Database) -> None:
    with db.read() as session:
        assert jobs.oldest_queued(session) is None
    running, oldest, _ = (create_job(db) for _ in range(3))
    set_status(db, running, "running")
    with db.read() as session:
        assert jobs.oldest_queued(session) == session.get_one(JobRow, oldest).created_at


def test_submissions_at_a_time_find_room_for_as_many_as_the_limit_says(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 3
    with db.read() as session:
        create_job(db)
        project = session.scalars(select(ProjectRow)).one()
    insert = jobs.create

    def insert_slowly(session, **fields):
        time.sleep(0.2)  # all others count meanwhile, unless they have to wait
        return insert(session, **fields)

    monkeypatch.setattr(jobs, "create", insert_slowly)

    def submit(number: int) -> bool:
        accepted = AcceptedJob(f"job {number}", {}, None)
        try:
            with db.write() as session:
                service.create(
                    session, org_id=project.org_id, project_id=project.id, accepted=accepted, max_unfinished=limit
                )
        except RateLimitError:
            return False
        return True

    with ThreadPoolExecutor(6) as threads:
        accepted = list(threads.map(submit, range(6)))
    assert accepted.count(True) == limit - 1
    with db.read() as session:
        assert jobs.count_unfinished(session, project.org_id) == limit
