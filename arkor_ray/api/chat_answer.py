"""A generation as the contract's answers: OpenAI chunks as they come, or one whole completion."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from arkor_ray.api.error_handlers import public_error
from arkor_ray.api.sse import DONE_FRAME, frame
from arkor_ray.errors import InternalError, ServiceUnavailableError
from arkor_ray.serving.assistant_turn import AssistantTurn, call_delta

# Clients give up after 300 s without response headers, and they learn more from an error than from that.
START_LIMIT_S = 240.0


class ChatAnswer:
    """One generation that has begun; to be read once, by `chunks` or by `whole`."""

    def __init__(self, model: str, start: dict[str, Any], items: AsyncGenerator[dict[str, Any]]) -> None:
        self._items = items
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": start.get("system_fingerprint"),
        }

    @classmethod
    async def begin(cls, model: str, items: AsyncGenerator[dict[str, Any]]) -> ChatAnswer:
        """Waits for the request's admission, so that what goes wrong until then still has a status code.

        Args:
            model: as the user named it.
            items: of `InferenceGateway.chat`.
        """
        try:
            async with asyncio.timeout(START_LIMIT_S):
                start = await anext(items, None)
            if start is None or start["type"] != "start":
                raise InternalError(f"The generation began with {start!r}")
        except TimeoutError as error:
            await items.aclose()
            raise ServiceUnavailableError(
                f"The model did not begin to answer within {START_LIMIT_S:g} s; it may still be loading, try again",
                retry_after=10,
            ) from error
        except BaseException:
            await items.aclose()
            raise
        return cls(model, start, items)

    async def chunks(self, *, include_usage: bool) -> AsyncGenerator[bytes]:
        """Frames of a stream. One that breaks off ends with an error frame and without [DONE]."""
        usage = {"usage": None} if include_usage else {}
        end: dict[str, Any] | None = None
        async with aclosing(self._items):
            yield self._chunk({"role": "assistant", "content": ""}, None, usage)
            try:
                async for item in self._items:
                    if item["type"] == "delta":
                        yield self._chunk({"content": item["text"]}, None, usage)
                    elif item["type"] == "tool_call_delta":
                        yield self._chunk({"tool_calls": [call_delta(item)]}, None, usage)
                    elif item["type"] == "end":
                        end = item
                if end is None:
                    raise InternalError("The generation stopped without an end")
            except Exception as error:
                # The status is long sent; every kind of failure must reach the reader in the stream.
                public = public_error(error)
                yield frame({"error": {"message": public.to_wire()["error"], "type": public.code, "code": public.code}})
                return
        yield self._chunk({}, end["finish_reason"], usage)
        if include_usage:
            yield frame({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": end["usage"]})
        yield DONE_FRAME

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece: OpenAI's shape, and the text once more at the top for readers of older docs.

        The text is None where the answer is calls of tools and nothing else.
        """
        turn = AssistantTurn()
        end: dict[str, Any] | None = None
        async with aclosing(self._items):
            async for item in self._items:
                if not turn.add(item) and item["type"] == "end":
                    end = item
        if end is None:
            raise InternalError("The generation stopped without an end")
        message = turn.message
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": end["finish_reason"]}],
            "usage": end["usage"],
            "content": message["content"],
        }

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None, usage: dict[str, None]) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return frame({**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage})
