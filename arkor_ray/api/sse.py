"""Server-sent events: the form of a frame, keeping a quiet stream alive, and ending it when the reader leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from arkor_ray.api.disconnect import unless_gone
from arkor_ray.schemas.event import END, PING

PING_S = 15.0  # both clients take a stream for dead when no byte comes for minutes; proxies are less patient


def frame(data: Any, *, event: str | None = None, id: int | None = None) -> bytes:
    """One frame with `data` as JSON. Raises ValueError for NaN and infinities, which no reader would understand.

    Frames without an id leave the reader's position where it was.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    head = (f"id: {id}\n" if id is not None else "") + (f"event: {event}\n" if event is not None else "")
    # Half a surrogate pair is no UTF-8; with a backslash it is still the JSON it was.
    return f"{head}data: {text}\n\n".encode(errors="backslashreplace")


PING_FRAME = frame({}, event=PING)
COMMENT_FRAME = b": ping\n\n"  # a ping for readers that take every frame with data for content
END_FRAME = frame({}, event=END)
DONE_FRAME = b"data: [DONE]\n\n"  # OpenAI's end of a stream, which is not JSON


async def with_pings(
    frames: AsyncGenerator[bytes], every_s: float = PING_S, ping: bytes = PING_FRAME
) -> AsyncGenerator[bytes]:
    """`frames`, and a ping whenever none came for `every_s`. Closes `frames` when it is closed itself."""
    waiting: asyncio.Future[bytes] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(anext(frames))
            while not (await asyncio.wait({waiting}, timeout=every_s))[0]:
                yield ping
            try:
                chunk = waiting.result()
            except StopAsyncIteration:
                return
            yield chunk
    finally:
        if waiting is not None and not waiting.done():
            waiting.cancel()
            await asyncio.wait({waiting})
        await frames.aclose()


class EventStream(StreamingResponse):
    """Frames as they come, with pings. The reader's leaving ends the source at once, not only at its next frame."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes], ping: bytes = PING_FRAME) -> None:
        self._frames = with_pings(frames, PING_S, ping)
        # Caches and buffering proxies would keep the reader waiting for what happens now.
        super().__init__(self._frames, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self.stream_response(send))
        except OSError:
            return  # how a server says, on sending, that the reader left
        finally:
            await self._frames.aclose()
