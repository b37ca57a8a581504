"""What the API does with jobs, inside one transaction that the caller opens. Nothing here knows HTTP or Ray."""

from __future__ import annotations

import re

from sqlalchemy.orm import Session

from arkor_ray.db import checkpoints, identities, jobs
from arkor_ray.db.tables import ID, CheckpointRow, JobRow
from arkor_ray.errors import ArkorError, ConflictError, GoneError, NotFoundError, RateLimitError
from arkor_ray.events import publisher
from arkor_ray.jobs.admission import AcceptedJob
from arkor_ray.jobs.artifacts import FINAL
from arkor_ray.schemas import event
from arkor_ray.schemas.chat import CheckpointAdapter, FinalAdapter
from arkor_ray.schemas.job import Job, JobStatus, hide_token

_STEP = re.compile(r"[0-9]{1,9}", re.ASCII)
MAX_STEP = 10**9  # well below what an integer column holds
RETRY_FULL_QUEUE_S = 30.0


def create(session: Session, *, org_id: str, project_id: str, accepted: AcceptedJob, max_unfinished: int) -> Job:
    """A queued job; the controller launches it. Raises RateLimitError when the organisation has too many unfinished."""
    unfinished = jobs.count_unfinished(session, org_id)
    if unfinished >= max_unfinished:
        raise RateLimitError(
            f"This organisation has {unfinished} unfinished jobs, and {max_unfinished} is the limit; "
            "wait for one to end or cancel one",
            retry_after=RETRY_FULL_QUEUE_S,
        )
    row = jobs.create(
        session,
        org_id=org_id,
        project_id=project_id,
        name=accepted.name,
        config=accepted.config,
        dataset_token=accepted.dataset_token,
    )
    return to_wire(row)


def get(session: Session, project_id: str, job_id: str) -> Job:
    """Raises NotFoundError, as everything here that takes a job's id."""
    return to_wire(find(session, project_id, job_id))


def list_jobs(session: Session, project_id: str) -> list[Job]:
    """All jobs of the project, newest first."""
    return [to_wire(row) for row in jobs.list_jobs(session, project_id)]


def cancel(session: Session, project_id: str, job_id: str) -> None:
    """Ends the job for its readers now; the controller stops its processes. Raises ConflictError if it had ended."""
    job = find(session, project_id, job_id)
    if not publisher.finish(session, job.id, JobStatus.CANCELLED, type=event.CANCELLED, fields={}):
        session.refresh(job)
        raise ConflictError(f"Job is already {job.status}")


def find(session: Session, project_id: str, job_id: str) -> JobRow:
    """The job of this project; one of another project is as unknown as one that never was."""
    if not ID.fullmatch(job_id):
        raise NotFoundError("No such job in this project: that is no job id")
    return jobs.get(session, project_id, job_id)


def find_as_member(session: Session, identity_id: str, job_id: str) -> JobRow:
    """The job wherever it is, if the identity is a member of its organisation: for URLs that carry no scope."""
    job = session.get(JobRow, job_id) if ID.fullmatch(job_id) else None
    if job is None or job.org_id not in {org.id for org in identities.orgs_of(session, identity_id)}:
        raise NotFoundError(f"No job {job_id[:64]}")
    return job


def find_checkpoint(session: Session, job: JobRow, reference: str) -> CheckpointRow:
    """By the reference that URLs carry: a step, or "final". Raises GoneError for one that was there and was removed."""
    if reference != FINAL and not _STEP.fullmatch(reference):
        raise NotFoundError(f"A checkpoint is named by its step or by 'final', not {reference[:40]!r}")
    row = checkpoints.find(session, job.id, None if reference == FINAL else int(reference))
    if row is None:
        raise _no_checkpoint(session, job, reference)
    return row


def find_adapter(
    session: Session, project_id: str, target: FinalAdapter | CheckpointAdapter
) -> tuple[JobRow, CheckpointRow]:
    """What an inference request names.

    ConflictError for the final adapter of a job that has not ended, GoneError for an adapter that was removed.
    """
    job = find(session, project_id, target.job_id)
    step = target.step if isinstance(target, CheckpointAdapter) else None
    if step is None and not JobStatus(job.status).is_terminal:
        raise ConflictError(
            f"Job is {job.status}: its final adapter does not exist yet. {_what_answers(session, job)}", param="adapter"
        )
    row = checkpoints.find(session, job.id, step) if step is None or step <= MAX_STEP else None
    if row is None:
        raise _no_checkpoint(session, job, FINAL if step is None else str(step))
    return job, row


def to_wire(row: JobRow) -> Job:
    return Job(
        id=row.id,
        org_id=row.org_id,
        project_id=row.project_id,
        name=row.name,
        status=JobStatus(row.status),
        config=hide_token(row.config),
        error=row.error,
        created_at=row.created_at,
        started_at=row.started_at,
        completed_at=row.completed_at,
    )


def _no_checkpoint(session: Session, job: JobRow, reference: str) -> ArkorError:
    if reference != FINAL and publisher.is_recorded(session, job.id, f"checkpoint:{int(reference)}"):
        return GoneError(
            f"The checkpoint at step {reference} was removed: this server keeps the adapters of ended jobs for a limited "
            f"time only. {_what_answers(session, job)}",
            param="adapter",
        )
    which = "final adapter" if reference == FINAL else f"checkpoint at step {reference}"
    return NotFoundError(f"Job is {job.status} and has no {which}. {_what_answers(session, job)}", param="adapter")


def _what_answers(session: Session, job: JobRow) -> str:
    steps = [str(row.step) for row in checkpoints.list_for_job(session, job.id) if not row.final]
    return f"Its checkpoints are at steps {', '.join(steps)}" if steps else "It has no checkpoint"
