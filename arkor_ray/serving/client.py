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
    cause: BaseException | None = error
    while cause is not None:
        # Ray raises a class that is both RayTaskError and the original; its `cause` is the original itself.
        original = getattr(cause, "cause", None)
        if isinstance(original, ArkorError):
            return original
        if isinstance(cause, ArkorError):
            return cause
        cause = original if isinstance(original, BaseException) else cause.__cause__
    return ServiceUnavailableError(
        f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}", retry_after=2
    )
