"""One request on an ASGI application, its answer read while it comes; httpx's own transport waits for the last byte."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlencode

from arkor_ray.client.event_stream import EventStreamParser, Frame

PATIENCE_S = 20.0  # how long a broken test waits before it fails; nothing is ever asserted about time


class AsgiStream:
    """Read with `frame` or `frames`, leave with `disconnect`, and see with `ended` that the application let go."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.raw = bytearray()
        self._parser = EventStreamParser()
        self._frames: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._started = asyncio.Event()
        self._left = asyncio.Event()
        self._can_send = asyncio.Event()
        self._can_send.set()

    @classmethod
    async def open(
        cls,
        app: Any,
        method: str,
        path: str,
        *,
        params: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        body: Any = None,
        wait: bool = True,
    ) -> AsgiStream:
        """Returns once the status and headers are there; with `wait` false, at once."""
        stream = cls()
        content = b"" if body is None else json.dumps(body).encode()
        sent = {"content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": urlencode(params or {}).encode(),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
            "server": ("arkor", 80),
            "client": ("127.0.0.1", 1),
        }
        request = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if request:
                return request.pop()
            await stream._left.wait()
            return {"type": "http.disconnect"}

        stream._task = asyncio.create_task(app(scope, receive, stream._send))
        stream._task.add_done_callback(lambda _: (stream._started.set(), stream._frames.put_nowait(None)))
        if wait:
            await stream.started()
        return stream

    async def started(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._started.wait()

    async def frame(self) -> Frame | None:
        """The next frame, pings included; None at the end."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._frames.get()

    async def frames(self, count: int | None = None) -> list[Frame]:
        """The next `count` frames, or all until the end."""
        found: list[Frame] = []
        while (count is None or len(found) < count) and (frame := await self.frame()) is not None:
            found.append(frame)
        return found

    def disconnect(self) -> None:
        self._left.set()

    def stall(self) -> None:
        """The reader stops reading: whoever sends now waits."""
        self._can_send.clear()

    async def ended(self) -> None:
        """Waits for the application to be done with the request; raises what it raised."""
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait({self._task})
        self._task.result()

    async def _send(self, message: dict[str, Any]) -> None:
        await self._can_send.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            self._started.set()
        else:
            self.raw += message.get("body", b"")
            for frame in self._parser.feed(message.get("body", b"")):
                self._frames.put_nowait(frame)
