"""Appending to a job's event log.

Numbers are 1, 2, 3 … because each is taken while the job's row is locked, in the transaction that inserts the event. An
event's `key` says what it reports ("log:12"); reporting it again, as a restarted worker does, changes nothing. A status
and the event that announces it are one transaction, so exactly one terminal event exists and nothing follows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from arkor_ray.db.tables import EventRow, JobRow
from arkor_ray.errors import ConflictError, GoneError
from arkor_ray.schemas import event
from arkor_ray.schemas.base import storable, utcnow
from arkor_ray.schemas.job import JobStatus


class JobEndedError(ConflictError):
    """The job has its terminal event; whoever still works for it should stop."""

    code = "job_ended"


class StaleAttemptError(ConflictError):
    """A newer attempt of the job is running; the writer belongs to a lost one and should stop."""

    code = "stale_attempt"


@dataclass(frozen=True)
class NewEvent:
    type: str
    key: str
    fields: dict[str, Any] = field(default_factory=dict)


def append(
    session: Session, job_id: str, type: str, fields: dict[str, Any], *, key: str, attempt: int | None = None
) -> int | None:
    """One event; returns its number, or None if `key` is recorded already. Raises as `append_all`."""
    return append_all(session, job_id, [NewEvent(type, key, fields)], attempt=attempt)[0]


def append_all(
    session: Session, job_id: str, events: list[NewEvent], *, attempt: int | None = None
) -> list[int | None]:
    """Appends in order; each answer is the event's number, or None where its key was recorded before.

    Raises JobEndedError or StaleAttemptError (for a writer of another `attempt`) and appends nothing, GoneError if the
    job does not exist.
    """
    return _append(session, _lock(session, job_id, attempt), events)


def start(session: Session, job_id: str, fields: dict[str, Any], *, attempt: int | None = None) -> int | None:
    """queued → running with training.started; None if the job had started before."""
    job = _lock(session, job_id, attempt)
    if job.status == JobStatus.QUEUED:
        job.status, job.started_at = JobStatus.RUNNING.value, utcnow()
    return _append(session, job, [NewEvent(event.STARTED, "started", fields)])[0]


def finish(
    session: Session,
    job_id: str,
    status: JobStatus,
    *,
    type: str,
    fields: dict[str, Any],
    error: str | None = None,
    attempt: int | None = None,
) -> bool:
    """The terminal status and its event, together. False, and nothing written, if the job had ended before."""
    try:
        job = _lock(session, job_id, attempt)
    except JobEndedError:
        return False
    _append(session, job, [NewEvent(type, "end", fields)])
    job.status, job.completed_at, job.dataset_token = status.value, utcnow(), None
    job.error = storable(error) if error is not None else None
    return True


def is_recorded(session: Session, job_id: str, key: str) -> bool:
    """Whether the job's log has an event under this key."""
    query = select(EventRow.number).where(EventRow.job_id == job_id, EventRow.key == key)
    return session.scalar(query) is not None


def _lock(session: Session, job_id: str, attempt: int | None) -> JobRow:
    # FOR UPDATE serialises writers on PostgreSQL; on SQLite the write transaction itself does.
    query = select(JobRow).where(JobRow.id == job_id).with_for_update().execution_options(populate_existing=True)
    job = session.scalar(query)
    if job is None:
        raise GoneError(f"Job {job_id} does not exist")
    if JobStatus(job.status).is_terminal:
        raise JobEndedError(f"Job {job_id} is already {job.status}")
    if attempt is not None and job.attempt != attempt:
        raise StaleAttemptError(f"Job {job_id} is at attempt {job.attempt}, this writer at {attempt}")
    return job


def _append(session: Session, job: JobRow, events: list[NewEvent]) -> list[int | None]:
    keys = {new.key for new in events}
    known = set(session.scalars(select(EventRow.key).where(EventRow.job_id == job.id, EventRow.key.in_(keys))))
    numbers: list[int | None] = []
    for new in events:
        if new.key in known:
            numbers.append(None)
            continue
        known.add(new.key)
        job.last_event += 1
        now = utcnow()
        session.add(
            EventRow(
                job_id=job.id,
                number=job.last_event,
                key=new.key,
                type=new.type,
                data=event.event_data(new.type, job.id, now, new.fields),
                created_at=now,
            )
        )
        numbers.append(job.last_event)
    session.flush()
    return numbers
