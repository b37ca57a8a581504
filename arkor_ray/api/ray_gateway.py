"""Inference and logs through Ray. Ray itself is imported only once a request needs it."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from arkor_ray.errors import InternalError, ServiceUnavailableError
from arkor_ray.jobs.launcher import FAILURES, ray_jobs_client
from arkor_ray.schemas.checkpoint import CheckpointManifest
from arkor_ray.serving import client as serving
from arkor_ray.serving.single_flight import SingleFlight
from arkor_ray.settings import Settings
from arkor_ray.telemetry.carried import carried

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

logger = logging.getLogger(__name__)

T = TypeVar("T")

GIVE_UP_S = 120.0  # a lost replica is replaced, its base model loaded again, well within this
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 2.0
PREPARE_S = 240.0  # well before clients give up waiting for an answer
ASK_AGAIN_S = 60.0  # how old what the controller said may be
ANSWER_S = 2.0
SLOW_S = 15.0  # a request that has not begun by then may wait for an application that is gone


class Cluster(Protocol):
    """The few things that the gateway asks of Ray."""

    async def ensure_serving(self, base_model: str, base_precision: str) -> None:
        """Returns once the application of this base runs."""

    async def handle(self, base_model: str, base_precision: str) -> Any:
        """The LLMServer deployment's handle."""

    async def default_precision(self) -> str:
        """The precision of base models where nobody names one."""

    def is_lost(self, error: BaseException) -> bool:
        """Whether `error` says that a process died or cannot be reached, rather than that it answered with an error."""


class RayInferenceGateway:
    """`InferenceGateway` over Ray Serve.

    Until the first item a request has left no trace, so it is tried again when its replica dies or its application must
    still start. Afterwards a loss is the caller's to know.
    """

    def __init__(self, settings: Settings, cluster: Cluster | None = None) -> None:
        self._precision = None if settings.default_precision == "auto" else settings.default_precision
        self._cluster = cluster or RayCluster()
        self._handles: dict[tuple[str, str], Any] = {}

    async def chat(
        self, base_model: str, base_precision: str | None, request: dict[str, Any], adapter_id: str | None
    ) -> AsyncGenerator[dict[str, Any]]:
        stream, first = await self._begin(base_model, base_precision, request, adapter_id)
        finished = False
        try:
            yield first
            async for item in stream:
                yield item
            finished = True
        except (Exception, asyncio.CancelledError) as error:
            if serving.cancelled_by_us(error):
                raise
            finished = True
            raise self._plain(error, "was lost while it answered") from error
        finally:
            if not finished:
                stream.cancel()

    async def prepare(self, base_model: str, base_precision: str | None, manifest: CheckpointManifest | None) -> None:
        async def admit(handle: Any, _precision: str) -> None:
            if manifest is not None:
                await _admit(handle, manifest)

        try:
            async with asyncio.timeout(PREPARE_S):
                await self._answered(base_model, base_precision, admit, surely=True)
        except TimeoutError as error:
            raise ServiceUnavailableError(
                f"Serving did not have it ready within {PREPARE_S:g} s; try again", retry_after=5
            ) from error

    async def _begin(
        self, base_model: str, base_precision: str | None, request: dict[str, Any], adapter_id: str | None
    ) -> tuple[Any, dict[str, Any]]:
        """The stream and its first item, from the first replica that lives to give one."""

        async def first_item(handle: Any, precision: str) -> tuple[Any, dict[str, Any]]:
            return await self._first_item(handle, base_model, precision, request, adapter_id)

        return await self._answered(base_model, base_precision, first_item)

    async def _answered(
        self,
        base_model: str,
        base_precision: str | None,
        ask: Callable[[Any, str], Awaitable[T]],
        *,
        surely: bool = False,
    ) -> T:
        """What `ask(handle, precision)` gives, tried again while nobody is there to answer.

        Args:
            surely: the application is asked for even where it is known to have run.
        """
        loop = asyncio.get_running_loop()
        deadline, delay = loop.time() + GIVE_UP_S, FIRST_DELAY_S
        while True:
            try:
                precision = base_precision or self._precision or await self._cluster.default_precision()
                handle = await self._handle(base_model, precision, surely=surely)
            except ServiceUnavailableError as error:  # the controller or the application is starting
                lost: BaseException = error
            else:
                try:
                    return await ask(handle, precision)
                except (Exception, asyncio.CancelledError) as error:
                    if serving.arkor_cause(error) is None:
                        # Nobody answered: the application may be gone, so the next request looks anew.
                        self._handles.pop((base_model, precision), None)
                    if serving.cancelled_by_us(error) or not self._may_retry(error):
                        raise self._plain(error, "could not begin to answer") from error
                    lost = error
            if loop.time() + delay > deadline:
                raise self._plain(lost, f"could not be reached for {GIVE_UP_S:g} s") from lost
            logger.warning("Trying again in %.1f s: %s: %s", delay, type(lost).__name__, lost)
            await asyncio.sleep(delay * random.uniform(0.5, 1))
            delay = min(2 * delay, LONGEST_DELAY_S)

    async def _handle(self, base_model: str, precision: str, *, surely: bool) -> Any:
        handle = self._handles.get((base_model, precision))
        if handle is None or surely:
            await self._cluster.ensure_serving(base_model, precision)
        if handle is None:
            handle = self._handles[base_model, precision] = await self._cluster.handle(base_model, precision)
        return handle

    async def _first_item(
        self, handle: Any, base_model: str, precision: str, request: dict[str, Any], adapter_id: str | None
    ) -> tuple[Any, dict[str, Any]]:
        # Requests for one adapter go to one replica, so that it is loaded once; those for the base go anywhere.
        session = adapter_id or uuid.uuid4().hex
        if context := carried():
            request = {**request, "context": context}
        stream = handle.options(stream=True, session_id=session).chat.remote(request, adapter_id)
        first = asyncio.ensure_future(anext(stream))
        # Beside it: a replica that is about to answer needs nobody who says that it runs.
        ensuring = asyncio.ensure_future(self._ensure_if_slow(base_model, precision))
        try:
            await asyncio.wait({first, ensuring}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                await ensuring
            elif ensuring.done() and not ensuring.cancelled() and ensuring.exception() is not None:
                logger.warning("Answered, though %s could not be looked after: %s", base_model, ensuring.exception())
            return stream, await first
        except BaseException:
            first.cancel()
            stream.cancel()
            raise
        finally:
            ensuring.cancel()

    async def _ensure_if_slow(self, base_model: str, precision: str) -> None:
        """After a while, has the application started in case it is gone. Raises why it cannot be, and ServiceUnavailableError
        only after many tries."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + GIVE_UP_S
        await asyncio.sleep(SLOW_S)
        while True:
            try:
                return await self._cluster.ensure_serving(base_model, precision)
            except ServiceUnavailableError as error:
                if loop.time() > deadline:
                    raise
                logger.warning("A request waits, and nobody says whether %s is served: %s", base_model, error)
            await asyncio.sleep(LONGEST_DELAY_S)

    def _may_retry(self, error: BaseException) -> bool:
        return isinstance(error, asyncio.CancelledError) or self._cluster.is_lost(error)

    def _plain(self, error: BaseException, what: str) -> BaseException:
        """The ArkorError to raise for `error`; our own cancellation stays what it is."""
        if serving.cancelled_by_us(error):
            return error
        if (cause := serving.arkor_cause(error)) is not None:
            return cause
        if self._may_retry(error):
            return ServiceUnavailableError(f"The inference replica {what}; try again", retry_after=2)
        return InternalError(f"The inference replica {what}: {type(error).__name__}")


class RayCluster:
    """`Cluster` of the Ray that this process is part of."""

    def __init__(self) -> None:
        self._precision: str | None = None
        self._asked_at = 0.0

    async def ensure_serving(self, base_model: str, base_precision: str) -> None:
        await serving.ensure_serving(base_model, base_precision)

    async def handle(self, base_model: str, base_precision: str) -> Any:
        return await serving.server_handle(base_model, base_precision)

    async def default_precision(self) -> str:
        """As the controller last said: it changes only when the first GPU joins, and a controller that hangs is no reason for
        requests to wait."""
        now = asyncio.get_running_loop().time()
        if self._precision is None:
            self._precision, self._asked_at = str(await serving.ask_controller("default_precision")), now
        elif now - self._asked_at > ASK_AGAIN_S:
            self._asked_at = now  # whoever comes meanwhile takes what is known
            try:
                async with asyncio.timeout(ANSWER_S):
                    self._precision = str(await serving.ask_controller("default_precision"))
            except (TimeoutError, ServiceUnavailableError) as error:
                logger.warning(
                    "The controller does not say the default precision; it stays %s: %s", self._precision, error
                )
        return self._precision

    def is_lost(self, error: BaseException) -> bool:
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        return isinstance(error, RayError | RayServeException) and not isinstance(error, RayTaskError)


class RayDriverLogs:
    """`DriverLogs` by way of the controller, which has the Ray Jobs client; followers go to Ray Jobs themselves."""

    def __init__(self) -> None:
        self._client: JobSubmissionClient | None = None
        self._look_ups: SingleFlight[JobSubmissionClient] = SingleFlight()
        self._failures = 0

    async def read(self, submission_id: str) -> str | None:
        return await serving.ask_controller("driver_logs", submission_id)

    async def follow(self, submission_id: str) -> AsyncGenerator[str]:
        import aiohttp

        try:
            client = await self._connected()
            async with aclosing(client.tail_job_logs(submission_id)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    self._failures = 0
                    yield piece
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            if isinstance(error, OSError):  # nobody there; a submission that Ray does not know is told by a ClientError
                self._failures += 1
                if self._failures % FAILURES == 0:
                    self._client = None
            raise ServiceUnavailableError(f"Ray Jobs does not give the log: {error}", retry_after=1) from error

    async def _connected(self) -> JobSubmissionClient:
        """One look-up for all who follow: without a head to ask it takes a minute, and a thread."""
        if self._client is None:
            self._client = await self._look_ups.run("client", lambda: serving.look_up(ray_jobs_client))
        return self._client


async def _admit(handle: Any, manifest: CheckpointManifest) -> None:
    # By the same session as the requests that follow, so that it is their replica that has it.
    response = handle.options(session_id=manifest.adapter_id).admit.remote(manifest.model_dump(mode="json"), None)
    try:
        await response
    except asyncio.CancelledError:
        response.cancel()
        raise
