"""Reaching a serving application from other Ray processes: its handle, and what its errors mean. No torch here."""

from __future__ import annotations

import asyncio
from typing import Any

from arkor_ray.errors import ArkorError, ServiceUnavailableError
from arkor_ray.serving.app import application_name

CONTROLLER = ("arkor-controller", "arkor")  # actor name and namespace, by name so that neither side imports the other


def server_handle(base_model: str, base_precision: str) -> Any:
    """The deployment handle of LLMServer for this base. The application must run (`ensure_serving`)."""
    from ray import serve

    return serve.get_deployment_handle("LLMServer", application_name(base_model, base_precision))


async def ensure_serving(base_model: str, base_precision: str) -> None:
    """Returns once the application runs. Raises ServiceUnavailableError with the reason if it cannot be started."""
    import ray

    try:
        controller = await asyncio.to_thread(ray.get_actor, *CONTROLLER)
        await controller.ensure_serving.remote(base_model, base_precision)
    except ValueError as error:  # no such actor
        raise ServiceUnavailableError("The controller is starting; try again", retry_after=1) from error
    except ray.exceptions.RayError as error:
        raise plain_error(error) from error


async def admit(manifest: dict[str, Any], data: bytes | None) -> dict[str, Any]:
    """Has one replica load an adapter; returns its answer. Raises the ArkorError it raised.

    Args:
        manifest: a CheckpointManifest as JSON.
        data: the bytes of adapter_model.safetensors, or None to let the replica read them from storage.
    """
    import ray

    await ensure_serving(manifest["base_model"], manifest["base_precision"])
    handle = server_handle(manifest["base_model"], manifest["base_precision"])
    try:
        return await handle.options(session_id=manifest["adapter_id"]).admit.remote(manifest, data)
    except ray.exceptions.RayError as error:
        raise plain_error(error) from error


def plain_error(error: BaseException) -> ArkorError:
    """The ArkorError inside a Ray error, or ServiceUnavailableError for a dead or unreachable process."""
    last_line = (str(error).strip().splitlines() or [""])[-1][:300]
    return arkor_cause(error) or ServiceUnavailableError(f"{type(error).__name__}: {last_line}", retry_after=2)


def arkor_cause(error: BaseException) -> ArkorError | None:
    """The ArkorError that a replica raised: Ray's exceptions carry it as their cause, and look like it without being it."""
    seen: BaseException | None = error
    while seen is not None:
        inner = seen.__dict__.get("cause")
        if isinstance(seen, ArkorError) and not isinstance(inner, BaseException):
            return seen
        seen = inner if isinstance(inner, BaseException) else None
    return None
