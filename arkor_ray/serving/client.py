"""Reaching a serving application from other Ray processes: its handle, and what its errors mean. No torch here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from arkor_ray.errors import ArkorError, ServiceUnavailableError, last_line
from arkor_ray.placement import CONTROLLER, NAMESPACE
from arkor_ray.serving.app import application_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

START_S = 300.0  # for an application to start: its base model may have to be fetched first
ENSURED_S = 5.0  # for an application that ran before

# Ray's look-ups block for minutes while its head is away; they must not use up the threads that everything else needs.
_LOOK_UPS = ThreadPoolExecutor(4, thread_name_prefix="ray-look-up")
_controller: list[Any] = []  # its actor handle, which outlives its restarts
_handles: dict[tuple[str, str], Any] = {}  # through which adapters were admitted before


async def server_handle(base_model: str, base_precision: str) -> Any:
    """The deployment handle of LLMServer for this base. Raises ServiceUnavailableError if the application does not run
    (`ensure_serving`), or while nobody can say so."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    name = application_name(base_model, base_precision)
    try:
        return await look_up(lambda: serve.get_deployment_handle("LLMServer", name))
    except KeyError as error:
        raise ServiceUnavailableError("The inference application has just been removed", retry_after=1) from error
    except (RayError, RayServeException) as error:  # Serve's own controller is starting again
        raise plain_error(error) from error


async def ensure_serving(base_model: str, base_precision: str, patience_s: float = START_S) -> None:
    """Returns once the application runs. Raises ServiceUnavailableError with the reason if it cannot be started, and with
    what it waits for if it still does after `patience_s`; 0: as soon as the controller says that it does not run yet."""
    deadline = time.monotonic() + patience_s
    while (waits_for := await ask_controller("ensure_serving", base_model, base_precision)) is not None:
        if time.monotonic() >= deadline:
            raise ServiceUnavailableError(f"Serving of {base_model} is starting: {waits_for}", retry_after=5)


async def ask_controller(method: str, *args: Any) -> Any:
    """What the service's controller answers. Raises the ArkorError it raised, or ServiceUnavailableError."""
    import ray

    try:
        controller = await look_up(_find_controller)
        return await getattr(controller, method).remote(*args)
    except ValueError as error:  # no such actor
        raise ServiceUnavailableError("The controller is starting; try again", retry_after=1) from error
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.ActorDiedError):  # for good: whoever started it has stopped it
            _controller.clear()
        raise plain_error(error) from error


async def admit(manifest: dict[str, Any], data: bytes | None) -> dict[str, Any]:
    """Has one replica load an adapter; returns its answer. Raises the ArkorError it raised, and ServiceUnavailableError soon
    where the application does not run yet, so that the caller knows what it waits for.

    Args:
        manifest: a CheckpointManifest as JSON.
        data: the bytes of adapter_model.safetensors, or None to let the replica read them from storage.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    base = manifest["base_model"], manifest["base_precision"]
    try:
        # While Ray's head is away nobody can say whether it runs, and yet it may well do.
        async with asyncio.timeout(ENSURED_S if base in _handles else None):
            await ensure_serving(*base, patience_s=0)
            _handles[base] = await server_handle(*base)
    except TimeoutError:
        if base not in _handles:
            raise
        logger.warning("Nobody says whether %s is served; it was before", base[0])
    handle = _handles[base]
    try:
        return await handle.options(session_id=manifest["adapter_id"]).admit.remote(manifest, data)
    except (RayError, RayServeException, asyncio.CancelledError) as error:
        if cancelled_by_us(error):
            raise
        raise plain_error(error) from error


def cancelled_by_us(error: BaseException) -> bool:
    """Whether `error` is a cancellation that somebody asked of this task. A replica that shuts down cancels its requests, and
    that arrives here as one that nobody asked for."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def plain_error(error: BaseException) -> ArkorError:
    """The ArkorError inside a Ray error, or ServiceUnavailableError for a dead or unreachable process."""
    if isinstance(error, asyncio.CancelledError):
        return ServiceUnavailableError("The replica shut down before it answered", retry_after=2)
    return arkor_cause(error) or ServiceUnavailableError(
        f"{type(error).__name__}: {last_line(str(error))}", retry_after=2
    )


def arkor_cause(error: BaseException) -> ArkorError | None:
    """The ArkorError that a replica raised: Ray's exceptions carry it as their cause, and look like it without being it."""
    seen: BaseException | None = error
    while seen is not None:
        inner = seen.__dict__.get("cause")
        if isinstance(seen, ArkorError) and not isinstance(inner, BaseException):
            return seen
        seen = inner if isinstance(inner, BaseException) else None
    return None


async def look_up(call: Callable[[], T]) -> T:
    """What `call`, which blocks while it asks Ray's head, returns or raises."""
    return await asyncio.get_running_loop().run_in_executor(_LOOK_UPS, call)


def _find_controller() -> Any:
    import ray

    if not _controller:
        _controller.append(ray.get_actor(CONTROLLER, NAMESPACE))
    return _controller[0]
