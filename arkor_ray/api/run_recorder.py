"""Watching a generation on its way to the client, so that it can be kept as a run."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from arkor_ray.api.endpoint_directory import ServedEndpoint
from arkor_ray.api.run_store import RunStore
from arkor_ray.db.runs import NewRun
from arkor_ray.schemas.base import utcnow
from arkor_ray.serving.assistant_turn import AssistantTurn

Items = AsyncGenerator[dict[str, Any]]
BYTES_PER_TOKEN = 8  # of an answer in memory, about


class RunRecorder:
    """One request's; made when it comes, since times count from there. Only an answer that came to its end is kept."""

    def __init__(self, store: RunStore, endpoint: ServedEndpoint, key_id: str | None, body_bytes: int) -> None:
        self._store = store
        self._endpoint = endpoint
        self._key_id = key_id
        self._body_bytes = body_bytes
        self._created_at = utcnow()
        self._began = time.monotonic()

    async def watch(self, asked: dict[str, Any], items: Items) -> Items:
        """`items` of `InferenceGateway.chat`, unchanged.

        Args:
            asked: `ChatRequest.for_engine()`.
        """
        turn = AssistantTurn()
        fingerprint: str | None = None
        first_token_ms: int | None = None
        async with aclosing(items):
            async for item in items:
                if turn.add(item):
                    first_token_ms = first_token_ms if first_token_ms is not None else self._elapsed_ms()
                elif item["type"] == "start":
                    fingerprint = item.get("system_fingerprint")
                elif item["type"] == "end":
                    self._keep(asked, turn.message, item, fingerprint, first_token_ms)
                yield item

    def _keep(
        self,
        asked: dict[str, Any],
        answer: dict[str, Any],
        end: dict[str, Any],
        fingerprint: str | None,
        first_token_ms: int | None,
    ) -> None:
        run = NewRun(
            endpoint_id=self._endpoint.id,
            key_id=self._key_id,
            model=self._endpoint.model,
            messages=asked["messages"],
            tools=asked["tools"] or None,
            answer=answer,
            finish_reason=end["finish_reason"],
            prompt_tokens=end["usage"]["prompt_tokens"],
            completion_tokens=end["usage"]["completion_tokens"],
            latency_ms=self._elapsed_ms(),
            first_token_ms=first_token_ms,
            system_fingerprint=fingerprint,
            created_at=self._created_at,
        )
        self._store.keep(run, self._body_bytes + BYTES_PER_TOKEN * run.completion_tokens)

    def _elapsed_ms(self) -> int:
        return round(1000 * (time.monotonic() - self._began))
