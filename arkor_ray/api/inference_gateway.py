"""What the API needs of the cluster behind it, so that routes and their tests know no Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from arkor_ray.schemas.checkpoint import CheckpointManifest


class InferenceGateway(Protocol):
    """The way to the inference replicas."""

    def chat(
        self, base_model: str, base_precision: str | None, request: dict[str, Any], adapter_id: str | None
    ) -> AsyncGenerator[dict[str, Any]]:
        """One generation; closing the iterator cancels it.

        Yields `{"type": "start", "prompt_tokens", "system_fingerprint"}` once the request is admitted and its prompt is
        read, any number of `{"type": "delta", "text"}` and `{"type": "tool_call_delta", "index", "arguments"}`, the first of
        each call with "id" and "name" and all of a call's arguments together JSON text, and `{"type": "end",
        "finish_reason", "usage"}`. Raises ArkorErrors; those that come before "start" left no trace.

        Args:
            base_model: where the base is loaded from, a Hub id or an absolute directory.
            base_precision: of the base; None for the service's default.
            request: `ChatRequest.for_engine()`.
            adapter_id: exactly this adapter, or None for the base model itself.
        """

    async def prepare(self, base_model: str, base_precision: str | None, manifest: CheckpointManifest | None) -> None:
        """Returns once the base model is served and, with a manifest, a replica has that adapter ready to answer.

        Raises AdapterError for an adapter that serving refuses, ServiceUnavailableError where nobody can serve now.
        """


class DriverLogs(Protocol):
    """The way to what a job's driver printed."""

    async def read(self, submission_id: str) -> str | None:
        """The newest of the output so far (`printed.newest`); None if Ray does not know the submission, or not any more.

        Raises ServiceUnavailableError when nobody can tell.
        """

    def follow(self, submission_id: str) -> AsyncGenerator[str]:
        """The output from its beginning, as it comes, until the driver ends. Raises ServiceUnavailableError."""
