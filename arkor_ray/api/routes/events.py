"""A job's event stream: everything so far, then what comes, then the end."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, cast

from fastapi import APIRouter, Depends, Header, Response
from sqlalchemy.exc import SQLAlchemyError

from arkor_ray.api import sse
from arkor_ray.api.deps import ScopeDep, ServicesDep
from arkor_ray.errors import GoneError, NotFoundError, ServiceUnavailableError
from arkor_ray.events.stream import EventTail
from arkor_ray.jobs import service
from arkor_ray.schemas.event import Event

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
LastEventId = Annotated[str | None, Header(alias="Last-Event-ID", description="Number of the last event seen.")]


def followed_job(services: ServicesDep, scope: ScopeDep, job_id: str, last_event_id: LastEventId = None) -> str:
    """The job's id. 404 if it is unknown; 410 if the client has seen events of it, so that it stops trying."""
    try:
        with services.db.read() as session:
            return service.find(session, scope.project.id, job_id).id
    except NotFoundError as error:
        if last_event_id:
            raise GoneError(f"Job {job_id} no longer exists in this project") from error
        raise


@router.get(
    "/{job_id}/events/stream",
    summary="Follow a job: replay, then events as they come, then `end`",
    responses={200: {"content": {"text/event-stream": {}}}},
    response_class=Response,
)
async def stream_events(
    services: ServicesDep, job_id: Annotated[str, Depends(followed_job)], last_event_id: LastEventId = None
) -> sse.EventStream:
    return sse.EventStream(_frames(services.tail, job_id, _position(last_event_id)))


async def _frames(tail: EventTail, job_id: str, after: int) -> AsyncGenerator[bytes]:
    try:
        # Closed here, not when it is collected: while it lives, the poller asks for this job's events.
        async with aclosing(cast(AsyncGenerator[Event], tail.follow(job_id, after))) as events:
            async for event in events:
                yield sse.frame(event.data, event=event.type, id=event.id)
    except ServiceUnavailableError:
        return  # without `end`, so that the client comes back, to another replica
    except (GoneError, SQLAlchemyError):
        # Ending without `end` makes the client come back, and then it gets a status that says what is the matter.
        logger.warning("The event stream of job %s broke off", job_id, exc_info=True)
        return
    yield sse.END_FRAME


def _position(last_event_id: str | None) -> int:
    """The number to go on from. An id that never was one of ours means: from the start."""
    return int(last_event_id) if last_event_id and _NUMBER.fullmatch(last_event_id) else 0
