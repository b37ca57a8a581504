"""What the processes of a job printed, attempt by attempt, from wherever it is now.

While Ray knows the attempt, from the driver's node; afterwards (the head was restarted, the node is gone) from the copy that
the driver puts into storage now and then, and at its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.concurrency import run_in_threadpool

from arkor_ray.api.deps import Services
from arkor_ray.api.inference_gateway import DriverLogs
from arkor_ray.db.tables import JobRow
from arkor_ray.errors import GoneError, NotFoundError, ObjectNotFoundError, ServiceUnavailableError
from arkor_ray.jobs import service
from arkor_ray.jobs.launcher import submission_id
from arkor_ray.printed import after
from arkor_ray.schemas.job import JobStatus
from arkor_ray.storage import layout

LOOK_S = 1.0  # how soon a follower notices the next attempt


class JobLogs:
    """The logs of one job of a project. Raises NotFoundError for one that is not there."""

    def __init__(self, services: Services, project_id: str, job_id: str) -> None:
        self._services = services
        self._project_id = project_id
        self._job_id = job_id

    async def read(self, attempt: int | None) -> str:
        """The newest megabytes that an attempt has printed so far; None: the newest attempt, and "" before the first."""
        newest = (await self._job()).attempt
        _check(attempt, newest)
        if not newest:
            return ""
        return await self._text(attempt or newest)

    async def follow(self, attempt: int | None) -> AsyncGenerator[str]:
        """As it is printed, until that attempt ends; None: the newest and those after it, until the job ends.

        What can be refused is refused before the first piece, which is empty.
        """
        job = await self._job()
        _check(attempt, job.attempt)
        logs = self._logs()
        current, sent, shown = attempt or job.attempt, 0, False  # sent: bytes of it
        yield ""
        while True:
            if current and not shown:
                try:
                    pieces = logs.follow(submission_id(self._job_id, current))
                    async with aclosing(_after(sent, pieces)) as rest:
                        async for piece in rest:
                            sent += len(piece.encode())
                            yield piece
                    shown = True
                except ServiceUnavailableError:  # not submitted yet, forgotten, or Ray restarts
                    if _is_over(job, current) and (left := await self._left(current, sent)) is not None:
                        yield left
                        shown = True
            job = await self._job()
            if shown and attempt is None and job.attempt > current:
                current, sent, shown = current + 1, 0, False
                yield f"\n=== attempt {current} ===\n"
            elif not current:
                current = job.attempt
            elif shown and (attempt is not None or JobStatus(job.status).is_terminal):
                return
            if not current and JobStatus(job.status).is_terminal:
                return
            await asyncio.sleep(LOOK_S)

    async def _text(self, attempt: int) -> str:
        away: ServiceUnavailableError | None = None
        try:
            text = await self._logs().read(submission_id(self._job_id, attempt))
        except ServiceUnavailableError as error:
            text, away = None, error
        if text is not None:
            return text
        try:
            stored = await run_in_threadpool(self._services.store.get, layout.log_key(self._job_id, attempt))
        except ObjectNotFoundError:
            gone = GoneError(
                f"What attempt {attempt} printed is lost: it ended with the Ray that ran it, without a copy"
            )
            raise (away or gone) from None
        return stored.decode(errors="replace")

    async def _left(self, attempt: int, sent: int) -> str | None:
        """What an attempt that is over printed after its first `sent` bytes; None while nobody can tell."""
        try:
            return after(sent, (await self._text(attempt)).encode()).decode(errors="replace")
        except GoneError as error:
            return f"{error.message}\n"  # in place of it: the next attempt is still to come
        except ServiceUnavailableError:
            return None

    def _logs(self) -> DriverLogs:
        if self._services.logs is None:
            raise ServiceUnavailableError("This process cannot reach the drivers' logs")
        return self._services.logs

    async def _job(self) -> JobRow:
        return await run_in_threadpool(self._find)

    def _find(self) -> JobRow:
        with self._services.db.read() as session:
            return service.find(session, self._project_id, self._job_id)


async def _after(sent: int, pieces: AsyncGenerator[str]) -> AsyncGenerator[str]:
    """`pieces` without the bytes that an earlier try has sent."""
    async with aclosing(pieces):
        async for piece in pieces:
            if sent:
                data = piece.encode()
                sent, piece = max(0, sent - len(data)), data[sent:].decode(errors="replace")
            if piece:
                yield piece


def _check(attempt: int | None, newest: int) -> None:
    if attempt is not None and not 1 <= attempt <= newest:
        there = f"attempts 1 to {newest}" if newest > 1 else "attempt 1 only" if newest else "none yet"
        raise NotFoundError(f"attempt: the job has no attempt {attempt}; it has {there}", param="attempt")


def _is_over(job: JobRow, attempt: int) -> bool:
    return job.attempt > attempt or JobStatus(job.status).is_terminal
