"""What the controller tells about jobs while it turns."""

from __future__ import annotations

from datetime import timedelta

import pytest

from arkor_ray.db import leases
from arkor_ray.db.tables import JobRow
from arkor_ray.events import publisher
from arkor_ray.jobs import job_figures
from arkor_ray.jobs.reconciler import LEASE, Reconciler
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.job import JobStatus
from arkor_ray.telemetry import metrics
from tests.db.factories import create_job
from tests.jobs.fake_launcher import due_now, finish


@pytest.fixture(autouse=True)
def count_each_turn(monkeypatch):
    monkeypatch.setattr(job_figures, "COUNT_S", 0.0)


def created(db, job_id: str, *, seconds_ago: float) -> None:
    with db.write() as session:
        session.get(JobRow, job_id).created_at = utcnow() - timedelta(seconds=seconds_ago)


def start(db, job_id: str, attempt: int | None = 1) -> None:
    with db.write() as session:
        publisher.start(session, job_id, {"metadata": {}}, attempt=attempt)


def test_all_jobs_are_counted_by_status_also_those_that_have_ended(db, reconciler, recorded):
    done, *_ = [create_job(db) for _ in range(3)]
    finish(db, done, JobStatus.CANCELLED)
    reconciler.turn()
    found = {status.value: recorded.now(metrics.JOBS, status=status.value) for status in JobStatus}
    assert found == {"queued": 2, "running": 0, "completed": 0, "failed": 0, "cancelled": 1}


def test_the_oldest_queued_job_has_an_age_and_no_queue_is_zero(db, reconciler, recorded):
    reconciler.turn()
    assert recorded.now(metrics.JOBS_OLDEST_QUEUED) == 0
    old, young = create_job(db), create_job(db)
    created(db, old, seconds_ago=600)
    created(db, young, seconds_ago=5)
    reconciler.turn()
    assert recorded.now(metrics.JOBS_OLDEST_QUEUED) == pytest.approx(600, abs=60)


def test_the_oldest_queued_job_has_an_age_while_every_place_is_taken(db, reconciler, recorded):
    for _ in range(2):
        start(db, create_job(db), attempt=None)
    reconciler.turn()
    waiting = create_job(db)
    created(db, waiting, seconds_ago=600)
    reconciler.turn()
    assert recorded.now(metrics.JOBS_OLDEST_QUEUED) == pytest.approx(600, abs=60)


def test_the_time_in_the_queue_is_told_of_a_job_that_waited_for_a_place(db, reconciler, recorded):
    first, second, third = (create_job(db) for _ in range(3))
    for job_id in (first, second):
        created(db, job_id, seconds_ago=400)
    created(db, third, seconds_ago=100)
    for _ in range(3):
        reconciler.turn()
    for job_id in (first, second):
        finish(db, job_id, JobStatus.CANCELLED)
    reconciler.turn()
    start(db, third)
    reconciler.turn()
    assert recorded.all(metrics.JOBS_QUEUE_SECONDS) == [pytest.approx(100, abs=60)]


def test_the_time_in_the_queue_is_told_once_when_training_starts(db, reconciler, recorded):
    job_id = create_job(db)
    created(db, job_id, seconds_ago=100)
    reconciler.turn()
    start(db, job_id)
    for _ in range(2):
        reconciler.turn()
    [waited] = recorded.all(metrics.JOBS_QUEUE_SECONDS)
    assert waited == pytest.approx(100, abs=60)


def test_attempts_retries_and_failures_are_counted(db, reconciler, launcher, recorded):
    job_id = create_job(db)
    for attempt in (1, 2):
        due_now(db, job_id)
        reconciler.turn()
        launcher.die(f"{job_id}-{attempt}")
        reconciler.turn()
    assert recorded.total(metrics.JOB_ATTEMPTS) == 2
    assert recorded.total(metrics.JOB_RETRIES, state="failed") == 1, "the second time was one too many"
    assert recorded.total(metrics.JOB_FAILURES, reason="infrastructure") == 1


def test_of_two_controllers_one_leads(db, settings, launcher, reconciler, recorded):
    assert reconciler.turn()
    assert recorded.now(metrics.CONTROLLER_LEADER) == 1
    assert not Reconciler(settings, db, launcher).turn()
    assert recorded.now(metrics.CONTROLLER_LEADER) == 0
    assert len(recorded.all(metrics.CONTROLLER_TURN_SECONDS)) == 1


def test_a_controller_that_no_longer_leads_counts_no_jobs(db, settings, launcher, reconciler, recorded):
    create_job(db)
    reconciler.turn()
    reconciler.release()
    with db.write() as session:
        assert leases.hold(session, LEASE, "another", 60)
    assert recorded.all(metrics.JOBS)
    reconciler.turn()
    assert not recorded.all(metrics.JOBS) and not recorded.all(metrics.JOBS_OLDEST_QUEUED)


def test_a_launch_is_a_span_of_the_jobs_trace(db, reconciler, spans):
    from arkor_ray.telemetry import tracing

    job_id = create_job(db)
    reconciler.turn()
    [launch] = spans()
    _, trace_id, first, _ = tracing.job_traceparent(job_id).split("-")
    assert (launch.name, f"{launch.context.trace_id:032x}") == ("launch attempt", trace_id)
    assert f"{launch.parent.span_id:016x}" == first
