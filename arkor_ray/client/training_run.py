"""The life of one submitted job as its user's code sees it: the core of `Trainer` and `AsyncTrainer`."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeVar

from arkor_ray.client.async_client import AsyncClient
from arkor_ray.client.callbacks import TrainerCallbacks, is_async, make_context
from arkor_ray.client.client import Client
from arkor_ray.client.event_stream import EventFollower
from arkor_ray.client.job_request import JobRequest
from arkor_ray.client.session import Session
from arkor_ray.errors import ConflictError
from arkor_ray.schemas.event import CANCELLED, COMPLETED, FAILED, STARTED, TERMINAL, Event
from arkor_ray.schemas.job import Job, JobStatus

logger = logging.getLogger(__name__)

T = TypeVar("T")

CALLBACK_ATTEMPTS = 3
CALLBACK_DELAY = 0.5  # seconds before a callback's second attempt; doubled before the third
ABORT_POLL = 0.05  # seconds between looks at the abort signal


class TrainingAborted(Exception):
    """`wait` was stopped by its abort signal. The job goes on; `wait` may be called again once the signal is cleared."""


class AbortSignal(Protocol):
    """`threading.Event`, `asyncio.Event`, or anything like them."""

    def is_set(self) -> bool: ...


#: Runs a plain function where it may block, and gives what it returned.
RunPlain = Callable[[Callable[[], Any]], Awaitable[Any]]


@dataclass(frozen=True)
class TrainingResult:
    """How a job ended: `status` is completed, failed or cancelled, and `error` says why it failed.

    A stream that the service ended without a last word gives the status that the job had then.
    """

    job: Job
    status: JobStatus
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] | None = None

    @property
    def error(self) -> str | None:
        return self.job.error


class TrainingRun:
    """One job: created at most once, its events dispatched in order, one at a time, each until its callback returned.

    Belongs to one event loop. It keeps its place: a `wait` that was stopped, or that raised a callback's error, can be
    called again and goes on with the first event whose callback has not returned.
    """

    def __init__(
        self,
        session: Session,
        request: JobRequest,
        callbacks: TrainerCallbacks,
        abort_signal: AbortSignal | None = None,
    ) -> None:
        self.session = session
        self.request = request
        #: As last heard of; None before `start`.
        self.job: Job | None = None
        self._callbacks = callbacks
        self._abort_signal = abort_signal
        self._follower = EventFollower()
        self._result: TrainingResult | None = None
        self._starting = asyncio.Lock()
        self._waiting = asyncio.Lock()

    async def start(self) -> Job:
        """Create the job. Idempotent, also when called concurrently; a creation that failed may be tried again."""
        async with AsyncClient(session=self.session) as client:
            return await self._start(client)

    async def wait(self, run_plain: RunPlain) -> TrainingResult:
        """Follow the job to its end, starting it if needed. See `Trainer.wait`."""
        return await self._until_aborted(self._wait(run_plain))

    async def cancel(self) -> None:
        if self.job is not None:
            async with AsyncClient(session=self.session) as client:
                await cancel_unless_ended(client, self.job.id)

    async def _start(self, client: AsyncClient) -> Job:
        async with self._starting:
            if self.job is None:
                self.job = await client.create_job(self.request.name, self.request.config)
            return self.job

    async def _wait(self, run_plain: RunPlain) -> TrainingResult:
        async with self._waiting:
            if self._result is None:
                async with AsyncClient(session=self.session) as client:
                    with Client(session=self.session) as blocking_client:
                        self._result = await self._follow(client, _Dispatcher(client, blocking_client, run_plain))
            return self._result

    async def _follow(self, client: AsyncClient, dispatcher: _Dispatcher) -> TrainingResult:
        job = await self._start(client)
        async with aclosing(client.follow(job.id, self._follower)) as events:
            async for event in events:
                job = self.job = _after(event, job)
                await self._dispatch(event, job, dispatcher)
                if event.type in TERMINAL:
                    data = event.data
                    return TrainingResult(job, job.status, data.get("artifacts") or [], data.get("metrics"))
        job = self.job = await client.get_job(job.id)
        return TrainingResult(job, job.status)

    async def _dispatch(self, event: Event, job: Job, dispatcher: _Dispatcher) -> None:
        callback = self._callbacks.for_event(event.type)
        if callback is None:
            return
        for attempt in range(1, CALLBACK_ATTEMPTS + 1):
            try:
                return await dispatcher.call(callback, event, job)
            except Exception as error:
                if attempt == CALLBACK_ATTEMPTS:
                    raise
                logger.warning("The callback for event %d (%s) raised %r; trying it again", event.id, event.type, error)
                await asyncio.sleep(CALLBACK_DELAY * 2 ** (attempt - 1))

    async def _until_aborted(self, work: Coroutine[Any, Any, T]) -> T:
        signal = self._abort_signal
        if signal is None:
            return await work
        if signal.is_set():
            work.close()
            raise TrainingAborted("The abort signal is set; nothing was begun")
        working = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(_set(signal))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            watching.result()
            raise TrainingAborted("The abort signal was set; the job goes on")
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)


class _Dispatcher:
    """Calls one callback: an async one here on the loop, a plain one where it may block."""

    def __init__(self, client: AsyncClient, blocking_client: Client, run_plain: RunPlain) -> None:
        self._client = client
        self._blocking_client = blocking_client
        self._run_plain = run_plain

    async def call(self, callback: Callable[[Any], Any], event: Event, job: Job) -> None:
        if is_async(callback):
            client = self._client
            await callback(make_context(event, job, client, lambda: cancel_unless_ended(client, job.id)))
            return
        blocking = self._blocking_client
        context = make_context(event, job, blocking, lambda: cancel_unless_ended_blocking(blocking, job.id))
        returned = await self._run_plain(lambda: callback(context))
        if inspect.isawaitable(returned):  # a lambda around an async function
            await returned


async def cancel_unless_ended(client: AsyncClient, job_id: str) -> None:
    """Whoever cancels wants the job to be over; that it is so already is no error to him."""
    try:
        await client.cancel_job(job_id)
    except ConflictError:
        logger.info("Job %s had ended before it could be cancelled", job_id)


def cancel_unless_ended_blocking(client: Client, job_id: str) -> None:
    try:
        client.cancel_job(job_id)
    except ConflictError:
        logger.info("Job %s had ended before it could be cancelled", job_id)


async def _set(signal: AbortSignal) -> None:
    # Polled, since a threading.Event cannot be awaited, and an asyncio.Event may belong to another loop.
    while not signal.is_set():
        await asyncio.sleep(ABORT_POLL)


def _after(event: Event, job: Job) -> Job:
    """The job as `event` left it."""
    moment = _timestamp(event)
    if event.type == STARTED:
        return job.model_copy(update={"status": JobStatus.RUNNING, "started_at": moment})
    ends = {COMPLETED: JobStatus.COMPLETED, FAILED: JobStatus.FAILED, CANCELLED: JobStatus.CANCELLED}
    if event.type in ends:
        error = event.data.get("error")
        return job.model_copy(update={"status": ends[event.type], "completed_at": moment, "error": error})
    return job


def _timestamp(event: Event) -> datetime | None:
    try:
        return datetime.fromisoformat(event.data.get("timestamp", ""))
    except (TypeError, ValueError):
        return None
