"""Jobs: creating, finding and listing them, and the compare-and-set rules of their life.

Status only moves forward (queued → running → completed | failed | cancelled); `JobStatus.is_terminal` has no way back.
Launches are numbered by `attempt`; claiming the next attempt fences every writer of an older one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, or_, select, update
from sqlalchemy.orm import Session, defer

from arkor_ray.db.tables import JobRow, OrgRow
from arkor_ray.errors import NotFoundError
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.job import JobStatus

UNFINISHED = (JobStatus.QUEUED.value, JobStatus.RUNNING.value)


def create(
    session: Session,
    *,
    org_id: str,
    project_id: str,
    name: str,
    config: dict[str, Any],
    dataset_token: str | None,
) -> JobRow:
    """A queued job. `config` must not hold the data set's token."""
    job = JobRow(
        org_id=org_id,
        project_id=project_id,
        name=name,
        config=config,
        dataset_token=dataset_token,
        status=JobStatus.QUEUED.value,
    )
    session.add(job)
    session.flush()
    return job


def get(session: Session, project_id: str, job_id: str) -> JobRow:
    """The job of this project. Raises NotFoundError, also for a job of another project."""
    job = session.scalar(select(JobRow).where(JobRow.id == job_id, JobRow.project_id == project_id))
    if job is None:
        raise NotFoundError(f"No job {job_id} in this project")
    return job


def list_jobs(session: Session, project_id: str) -> Sequence[JobRow]:
    """All jobs of a project, newest first."""
    newest_first = (JobRow.created_at.desc(), JobRow.id)
    return session.scalars(select(JobRow).where(JobRow.project_id == project_id).order_by(*newest_first)).all()


def count_unfinished(session: Session, org_id: str) -> int:
    """To be followed by `create`: until the transaction ends nobody else counts the organisation's jobs.

    On PostgreSQL two that count at a time would both find room for the last job; SQLite has one writer anyway.
    """
    # Weaker than FOR UPDATE, which would also hold up whoever adds a row that refers to the organisation.
    session.execute(select(OrgRow.id).where(OrgRow.id == org_id).with_for_update(key_share=True))
    where = (JobRow.org_id == org_id, JobRow.status.in_(UNFINISHED))
    return session.scalar(select(func.count()).select_from(JobRow).where(*where)) or 0


def count_by_status(session: Session) -> dict[str, int]:
    """All jobs of the service; a status that no job has is left out."""
    query = select(JobRow.status, func.count()).group_by(JobRow.status)
    return dict(session.execute(query).tuples().all())


def oldest_queued(session: Session) -> datetime | None:
    """When the job that has been queued longest was created; None if none is queued."""
    return session.scalar(select(func.min(JobRow.created_at)).where(JobRow.status == JobStatus.QUEUED.value))


def launched(session: Session) -> Sequence[JobRow]:
    """Jobs whose submission may still run, unfinished or ended, without their configs. Oldest first."""
    unfinished = JobRow.status.in_(UNFINISHED)
    running = unfinished & JobRow.submission_id.is_not(None)
    stopping = ~unfinished & JobRow.stopped_at.is_(None) & (JobRow.attempt > 0)
    return session.scalars(_without_config().where(or_(running, stopping))).all()


def to_launch(session: Session, now: datetime, limit: int) -> Sequence[JobRow]:
    """Jobs that wait for an attempt which may begin `now`, without their configs: the `limit` oldest."""
    due = or_(JobRow.retry_at.is_(None), JobRow.retry_at <= now)
    waiting = JobRow.status.in_(UNFINISHED) & JobRow.submission_id.is_(None)
    return session.scalars(_without_config().where(waiting, due).limit(limit)).all()


def config_of(session: Session, job_id: str) -> dict[str, Any]:
    return session.scalars(select(JobRow.config).where(JobRow.id == job_id)).one()


def ends(session: Session, job_ids: Collection[str]) -> dict[str, datetime | None]:
    """When each of these jobs ended for good: it has its last word, and nothing of it runs or ever will again.

    None for a job of which that cannot be said. A job that does not exist is left out.
    """
    columns = (JobRow.id, JobRow.status, JobRow.attempt, JobRow.stopped_at, JobRow.completed_at)
    rows = session.execute(select(*columns).where(JobRow.id.in_(list(job_ids))))
    return {
        row.id: row.completed_at
        if JobStatus(row.status).is_terminal and (row.stopped_at is not None or row.attempt == 0)
        else None
        for row in rows
    }


def claim_attempt(session: Session, job_id: str, *, attempt: int, submission_id: str) -> bool:
    """Moves an unfinished job from attempt - 1 to `attempt`. False if somebody else did, or the job ended."""
    return _update(
        session,
        (JobRow.id == job_id, JobRow.attempt == attempt - 1, JobRow.status.in_(UNFINISHED)),
        attempt=attempt,
        submission_id=submission_id,
        retry_at=None,
    )


def plan_retry(
    session: Session,
    job_id: str,
    *,
    attempt: int,
    retry_at: datetime,
    retries: int,
    forgotten: int,
    lost_at_step: int | None,
) -> bool:
    """Plans the relaunch of a lost attempt at `retry_at`, with the counts of losses and the step that it had reached."""
    where = (JobRow.id == job_id, JobRow.attempt == attempt, JobRow.status.in_(UNFINISHED))
    counts = {"retries": retries, "forgotten": forgotten, "lost_at_step": lost_at_step}
    return _update(session, where, retry_at=retry_at, submission_id=None, **counts)


def mark_stopped(session: Session, job_id: str) -> None:
    """An ended job whose submission is gone: nothing is left to do for it."""
    _update(session, (JobRow.id == job_id, JobRow.stopped_at.is_(None)), stopped_at=utcnow(), dataset_token=None)


def drop_dataset_token(session: Session, job_id: str) -> None:
    """The data set is fetched and stored; its token was used once and is forgotten."""
    _update(session, (JobRow.id == job_id,), dataset_token=None)


def _without_config() -> Select[JobRow]:
    """Oldest first. The controller asks twice a second, and a config may have 64 KiB."""
    return select(JobRow).options(defer(JobRow.config, raiseload=True)).order_by(JobRow.created_at, JobRow.id)


def _update(session: Session, where: tuple[Any, ...], **values: Any) -> bool:
    result = session.execute(update(JobRow).where(*where).values(**values).execution_options(synchronize_session=False))
    return bool(result.rowcount)  # type: ignore[attr-defined]
