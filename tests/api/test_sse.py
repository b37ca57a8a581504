"""The form of frames, and streams that stay alive and end when they should."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest

from arkor_ray.api import sse
from arkor_ray.client.event_stream import EventStreamParser

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "data",
    [{}, {"text": "two\nlines\r\nand\rmore"}, {"text": "\u2028 😀 ä"}, {"text": "data: x\n\nevent: end"}, [1, None]],
)
async def test_frame_is_read_back_as_it_was_written(data: object) -> None:
    [frame] = EventStreamParser().feed(sse.frame(data, event="training.log", id=17))
    assert (frame.id, frame.event, json.loads(frame.data)) == ("17", "training.log", data)


async def test_frame_without_id_and_name_is_a_bare_data_line() -> None:
    assert sse.frame({"a": 1}) == b'data: {"a":1}\n\n'


async def test_half_a_surrogate_pair_is_still_json() -> None:
    [frame] = EventStreamParser().feed(sse.frame({"text": "\ud83d!"}))
    assert json.loads(frame.data) == {"text": "\ud83d!"}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
async def test_number_that_is_no_json_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        sse.frame({"loss": number})


async def test_every_frame_has_a_data_line() -> None:
    for fixed in (sse.PING_FRAME, sse.END_FRAME, sse.DONE_FRAME):
        assert b"data: " in fixed and fixed.endswith(b"\n\n")


async def test_pings_fill_silence_only() -> None:
    release = asyncio.Event()

    async def source() -> AsyncGenerator[bytes]:
        yield b"1"
        yield b"2"
        await release.wait()
        yield b"3"

    stream = sse.with_pings(source(), every_s=0.01)
    assert [await anext(stream) for _ in range(4)] == [b"1", b"2", sse.PING_FRAME, sse.PING_FRAME]
    release.set()
    rest = [chunk async for chunk in stream if chunk != sse.PING_FRAME]
    assert rest == [b"3"]


@pytest.mark.parametrize("waiting", [True, False])
async def test_closing_a_stream_closes_its_source(waiting: bool) -> None:
    closed = asyncio.Event()

    async def source() -> AsyncGenerator[bytes]:
        try:
            yield b"1"
            if waiting:
                await asyncio.Event().wait()
            yield b"2"
        finally:
            closed.set()

    stream = sse.with_pings(source(), every_s=0.01)
    await anext(stream)
    if waiting:
        assert await anext(stream) == sse.PING_FRAME
    await stream.aclose()
    assert closed.is_set()


async def test_error_of_the_source_is_raised() -> None:
    async def source() -> AsyncGenerator[bytes]:
        yield b"1"
        raise RuntimeError("broken")

    stream = sse.with_pings(source(), every_s=10)
    assert await anext(stream) == b"1"
    with pytest.raises(RuntimeError, match="broken"):
        await anext(stream)
