"""Text out of the answers of the inference route, streamed or whole. No I/O."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from arkor_ray.client.event_stream import EventStreamParser
from arkor_ray.errors import from_wire
from arkor_ray.schemas.event import END, PING

DONE = "[DONE]"


class TextReader:
    """The pieces of text in a streamed answer, by the rules that the contract gives for its frames."""

    def __init__(self) -> None:
        self._parser = EventStreamParser()
        self.done = False

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The pieces that `chunk` completes. Raises the error that the server put into the stream, if it did."""
        for frame in self._parser.feed(chunk):
            if self.done or frame.event == PING:
                continue
            if frame.event == END or frame.data.strip() == DONE:
                self.done = True
                continue
            text = _piece(frame.data)
            if text:
                yield text


def text_of(response: httpx.Response) -> str:
    """The text of an answer given with `stream=False`."""
    body = response.json()
    return _at(body, "choices", 0, "message", "content") or _at(body, "content") or ""


def iter_text(response: httpx.Response) -> Iterator[str]:
    """The pieces of a streamed answer as they come; closes the response at the end."""
    reader = TextReader()
    try:
        for chunk in response.iter_bytes():
            yield from reader.feed(chunk)
            if reader.done:
                return
    finally:
        response.close()


async def aiter_text(response: httpx.Response) -> AsyncIterator[str]:
    """As `iter_text`, for a response of `AsyncClient`."""
    reader = TextReader()
    try:
        async for chunk in response.aiter_bytes():
            for piece in reader.feed(chunk):
                yield piece
            if reader.done:
                return
    finally:
        await response.aclose()


def _piece(data: str) -> str | None:
    try:
        value = json.loads(data)
    except ValueError:
        return data
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and value.get("error"):
        raise from_wire(500, value)
    for path in (("choices", 0, "delta", "content"), ("content",), ("text",)):
        text = _at(value, *path)
        if text is not None:
            return text
    return None


def _at(value: Any, *path: str | int) -> str | None:
    for key in path:
        try:
            value = value[key]
        except (LookupError, TypeError):
            return None
    return value if isinstance(value, str) else None
