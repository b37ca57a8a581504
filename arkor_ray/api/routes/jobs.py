"""Fine-tuning jobs: create, look, cancel."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import PlainTextResponse, StreamingResponse

from arkor_ray.api.bodies import Done, JobAnswer, JobDetail, JobList
from arkor_ray.api.deps import ScopeDep, ServicesDep
from arkor_ray.api.job_logs import JobLogs
from arkor_ray.api.request_body import StrictJsonRoute
from arkor_ray.events.stream import read_events
from arkor_ray.jobs import admission, service
from arkor_ray.schemas.job import JobCreate
from arkor_ray.telemetry import tracing

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=StrictJsonRoute)

Attempt = Annotated[int | None, Query(ge=1, le=10**6, description="Launches are numbered from 1; absent: the newest.")]


@router.post("", status_code=201, summary="Submit a job; 400 names the first bad field")
def create_job(services: ServicesDep, scope: ScopeDep, body: JobCreate) -> JobAnswer:
    accepted = admission.accept(services.settings, body)
    with services.db.write() as session:
        job = service.create(
            session,
            org_id=scope.org.id,
            project_id=scope.project.id,
            accepted=accepted,
            max_unfinished=services.settings.max_queued_jobs,
        )
    tracing.record_submission(job.id, arkor__model=str(job.config.get("model")))
    return JobAnswer(job=job)


@router.get("", summary="List all jobs of a project, newest first")
def list_jobs(services: ServicesDep, scope: ScopeDep) -> JobList:
    with services.db.read() as session:
        return JobList(jobs=service.list_jobs(session, scope.project.id))


@router.get("/{job_id}", summary="Get a job and its events so far")
def get_job(services: ServicesDep, scope: ScopeDep, job_id: str) -> JobDetail:
    with services.db.read() as session:
        job = service.get(session, scope.project.id, job_id)
        return JobDetail(job=job, events=[event.data for event in read_events(session, job.id)])


@router.post("/{job_id}/cancel", summary="Cancel a job; 409 if it has ended")
def cancel_job(services: ServicesDep, scope: ScopeDep, job_id: str) -> Done:
    with services.db.write() as session:
        service.cancel(session, scope.project.id, job_id)
    return Done(ok=True)


@router.get(
    "/{job_id}/logs",
    summary="What the job's driver and workers printed, of the newest attempt or a given one; `follow` stays",
    responses={200: {"content": {"text/plain": {}}}},
    response_class=Response,
)
async def job_logs(
    services: ServicesDep, scope: ScopeDep, job_id: str, attempt: Attempt = None, follow: bool = False
) -> Response:
    logs = JobLogs(services, scope.project.id, job_id)
    if not follow:
        return PlainTextResponse(await logs.read(attempt))
    pieces = logs.follow(attempt)
    await anext(pieces)  # what can be refused still has a status
    return StreamingResponse(pieces, media_type="text/plain")
