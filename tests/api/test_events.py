"""The event stream: everything so far, then what comes, then the end; for any number of readers."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest
from sqlalchemy import delete
from sqlalchemy.orm import Session

from arkor_ray.api import sse
from arkor_ray.client.event_stream import EventFollower, Frame
from arkor_ray.db.session import Database
from arkor_ray.db.tables import JobRow
from arkor_ray.events import stream as event_stream
from arkor_ray.events.stream import EventTail
from tests.api.asgi_stream import AsgiStream
from tests.api.conftest import Training, User
from tests.db import databases

pytestmark = pytest.mark.anyio

STREAMS = int(os.environ.get("ARKOR_RAY_TEST_STREAMS", "300"))
STARTED, LOG, COMPLETED, CANCELLED, END = (
    "training.started",
    "training.log",
    "training.completed",
    "training.cancelled",
    "end",
)


@pytest.fixture
async def job_id(user: User) -> str:
    return await user.create_job()


@pytest.fixture
async def ended(job_id: str, training: Training) -> str:
    """A completed job with 5 events."""
    training.start(job_id)
    for step in (1, 2, 3):
        training.log(job_id, step)
    training.complete(job_id)
    return job_id


def shown(frames: list[Frame]) -> list[tuple[str | None, str]]:
    return [(frame.id, frame.event) for frame in frames]


def without_pings(frames: list[Frame]) -> list[tuple[str | None, str]]:
    return shown([frame for frame in frames if frame.event != "ping"])


@databases.both
async def test_finished_job_is_replayed_then_ended(user: User, ended: str) -> None:
    stream = await user.follow(ended)
    assert stream.status == 200 and stream.headers["content-type"].startswith("text/event-stream")
    frames = await stream.frames()
    assert shown(frames) == [("1", STARTED), ("2", LOG), ("3", LOG), ("4", LOG), ("5", COMPLETED), (None, END)]
    for frame in frames[:-1]:
        data = json.loads(frame.data)
        assert data["type"] == frame.event and data["jobId"] == ended and data["timestamp"].endswith("Z")
    assert frames[-1].data == "{}"
    await stream.ended()


@databases.both
async def test_running_job_is_followed_as_it_goes(user: User, job_id: str, training: Training) -> None:
    stream = await user.follow(job_id)
    training.start(job_id)
    assert shown(await stream.frames(1)) == [("1", STARTED)]
    training.log(job_id, 1)
    assert shown(await stream.frames(1)) == [("2", LOG)]
    training.complete(job_id)
    assert shown(await stream.frames()) == [("3", COMPLETED), (None, END)]


@databases.both
async def test_reader_resumes_after_the_last_event_it_saw(user: User, ended: str) -> None:
    stream = await user.follow(ended, last_event_id="3")
    assert shown(await stream.frames()) == [("4", LOG), ("5", COMPLETED), (None, END)]


@databases.both
async def test_reader_that_saw_everything_of_an_ended_job_gets_the_end_with_200(user: User, ended: str) -> None:
    stream = await user.follow(ended, last_event_id="5")
    assert stream.status == 200 and shown(await stream.frames()) == [(None, END)]


@pytest.mark.parametrize("unknown", ["6", "999999999999999999", "99999999999999999999", "-1", "abc", "1.5", "٣", "0"])
async def test_unknown_last_event_id_replays_from_the_start(user: User, ended: str, unknown: str) -> None:
    path = f"/v1/jobs/{ended}/events/stream"
    answer = await user.get(path, headers={"Last-Event-ID": unknown.encode()})  # type: ignore[dict-item]
    assert answer.status_code == 200 and answer.text.startswith("id: 1\n")


@databases.both
async def test_cancelled_job_ends_its_streams(user: User, job_id: str, training: Training) -> None:
    """No client knows this event; it is the end frame that lets `wait()` return."""
    training.start(job_id)
    stream = await user.follow(job_id)
    await user.post(f"/v1/jobs/{job_id}/cancel")
    assert shown(await stream.frames()) == [("1", STARTED), ("2", CANCELLED), (None, END)]


async def test_failed_job_carries_its_error(user: User, job_id: str, training: Training) -> None:
    training.fail(job_id, "no usable row")
    failed, end = await (await user.follow(job_id)).frames()
    assert json.loads(failed.data)["error"] == "no usable row" and end.event == END


async def test_quiet_stream_has_headers_at_once_and_pings(
    user: User, job_id: str, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse.with_pings, "__defaults__", (0.01,))
    stream = await user.follow(job_id)  # returns with the headers, though nothing has happened
    first, second = await stream.frames(2)
    assert shown([first, second]) == [(None, "ping"), (None, "ping")] and first.data == "{}"
    training.start(job_id)
    while (frame := await stream.frame()) is not None and frame.event == "ping":
        pass
    assert frame is not None and frame.event == STARTED, "pings must not disturb events"
    stream.disconnect()
    await stream.ended()


async def test_readers_are_independent(user: User, job_id: str, training: Training) -> None:
    training.start(job_id)
    fast, late, slow = await user.follow(job_id), await user.follow(job_id, "1"), await user.follow(job_id)
    slow.stall()
    for step in range(1, 30):
        training.log(job_id, step)
    training.complete(job_id)
    assert len(await fast.frames()) == 32 and len(await late.frames()) == 31
    slow._can_send.set()
    assert [int(frame.id) for frame in await slow.frames() if frame.id] == list(range(1, 32))


async def test_reader_that_leaves_is_forgotten_at_once(user: User, job_id: str, tail: EventTail) -> None:
    streams = [await user.follow(job_id) for _ in range(3)]
    await until(lambda: job_id in tail._channels and tail._channels[job_id].followers == 3)
    for stream in streams:
        stream.disconnect()
        await stream.ended()
    assert tail._channels == {}
    assert tail._poller is not None
    await asyncio.wait_for(tail._poller, 10)  # nobody follows, so nobody asks the database


async def test_reader_that_leaves_while_it_cannot_be_sent_to_is_forgotten_too(
    user: User, job_id: str, training: Training, tail: EventTail
) -> None:
    stream = await user.follow(job_id)
    stream.stall()
    training.start(job_id)
    await until(lambda: bool(tail._channels) and tail._channels[job_id].last == 1)
    stream.disconnect()
    await stream.ended()
    assert tail._channels == {}


async def test_unknown_job_is_404_but_gone_for_who_saw_it(user: User) -> None:
    path = "/v1/jobs/00000000-0000-4000-8000-000000000000/events/stream"
    assert (await user.get(path)).status_code == 404
    gone = await user.get(path, headers={"Last-Event-ID": "3"})
    assert gone.status_code == 410 and gone.json()["code"] == "gone"


async def test_job_deleted_meanwhile_breaks_off_without_an_end(
    user: User, job_id: str, training: Training, db: Database
) -> None:
    """So the client comes back with the last id, and then gets the 410 that makes it stop."""
    training.start(job_id)
    stream = await user.follow(job_id)
    await stream.frames(1)
    with db.write() as session:
        session.execute(delete(JobRow).where(JobRow.id == job_id))
    assert await stream.frames() == []
    again = await user.get(f"/v1/jobs/{job_id}/events/stream", headers={"Last-Event-ID": "1"})
    assert again.status_code == 410


async def test_hundreds_of_streams_share_one_poller(
    user: User, job_id: str, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    read = event_stream.EventTail._news

    def counted(self: EventTail, positions: dict[str, int]) -> Any:
        nonlocal looks
        looks += 1
        return read(self, positions)

    monkeypatch.setattr(event_stream.EventTail, "_news", counted)
    training.start(job_id)
    streams: list[AsgiStream] = []
    for _ in range(STREAMS // 100):
        streams += await asyncio.gather(*(user.follow(job_id) for _ in range(100)))
    for stream in streams:
        assert without_pings(await stream.frames(1)) == [("1", STARTED)]
    looks = 0
    reads = count_queries(monkeypatch)
    training.complete(job_id)
    for stream in streams:
        assert without_pings(await stream.frames()) == [("2", COMPLETED), (None, END)]
    assert 1 <= looks < 100, "one look for all followers, not one for each"
    assert reads() < 100, "the news is handed on, not read again by each follower"


def count_queries(monkeypatch: pytest.MonkeyPatch) -> Any:
    count = 0
    original = event_stream.read_events

    def counted(session: Session, *args: Any) -> Any:
        nonlocal count
        count += 1
        return original(session, *args)

    monkeypatch.setattr(event_stream, "read_events", counted)
    return lambda: count


async def test_client_reads_the_same_events_wherever_it_is_cut_off(user: User, ended: str) -> None:
    """The SDK's own parser, fed up to any byte, then resumed by the id it holds, sees each event once."""
    stream = await user.follow(ended)
    await stream.frames()
    raw = bytes(stream.raw)
    tails = {number: raw[raw.index(f"id: {number}\n".encode()) :] for number in range(1, 6)}
    tails[6] = raw[raw.index(b"event: end") :]
    for cut in range(len(raw) + 1):
        follower = EventFollower()
        follower.connect()
        seen = [event.id for event in follower.receive(raw[:cut])]
        if not follower.done:
            resumed = follower.connect().get("Last-Event-ID", "0")
            for byte in tails[int(resumed) + 1]:
                seen += [event.id for event in follower.receive(bytes([byte]))]
        assert seen == [1, 2, 3, 4, 5] and follower.done


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)
