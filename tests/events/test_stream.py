"""Following a job: replay, then live, for any number of followers."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import delete

from arkor_ray.db.session import Database
from arkor_ray.db.tables import Base, JobRow
from arkor_ray.errors import GoneError, ServiceUnavailableError
from arkor_ray.events import publisher, stream
from arkor_ray.events.stream import EventTail
from arkor_ray.schemas import event
from arkor_ray.schemas.job import JobStatus
from tests.db.factories import create_job

WAIT_S = 20


class Log:
    """A job whose events are written by hand."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.job_id = create_job(db)
        self.step = 0

    def write(self, count: int = 1) -> None:
        with self.db.write() as session:
            for _ in range(count):
                self.step += 1
                publisher.append(session, self.job_id, event.LOG, {"step": self.step}, key=f"log:{self.step}")

    def end(self) -> None:
        with self.db.write() as session:
            publisher.finish(session, self.job_id, JobStatus.COMPLETED, type=event.COMPLETED, fields={})

    def delete(self) -> None:
        with self.db.write() as session:
            session.execute(delete(JobRow))


@pytest.fixture
def log(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'arkor.db'}")
    Base.metadata.create_all(database.engine)
    yield Log(database)
    database.close()


async def numbers(tail, job_id, after=0):
    return [e.id async for e in tail.follow(job_id, after)]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, WAIT_S))


def test_a_finished_job_is_replayed_from_any_position(log):
    log.write(4)
    log.end()
    tail = EventTail(log.db)

    async def main():
        return [await numbers(tail, log.job_id, after) for after in (0, 3, 4, 5, 99, -1)]

    assert run(main()) == [[1, 2, 3, 4, 5], [4, 5], [5], [], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]


def test_followers_get_what_comes_each_exactly_once(log):
    log.write(3)

    async def main():
        tail = EventTail(log.db, poll_s=0.01)
        followers = [asyncio.create_task(numbers(tail, log.job_id, after)) for after in (0, 0, 2)]
        for _ in range(10):
            await asyncio.sleep(0.02)
            await asyncio.to_thread(log.write, 3)
        await asyncio.to_thread(log.end)
        return await asyncio.gather(*followers), tail

    (one, two, three), tail = run(main())
    assert one == two == list(range(1, 35))
    assert three == list(range(3, 35))
    assert tail._channels == {}


def test_a_slow_follower_falls_back_to_the_database_and_misses_nothing(log, monkeypatch):
    monkeypatch.setattr(stream, "PAGE", 5)

    async def main():
        tail = EventTail(log.db, poll_s=0.01)
        slow, seen = tail.follow(log.job_id), []
        log.write(1)
        seen.append((await anext(slow)).id)
        log.write(100)
        fast = asyncio.create_task(numbers(tail, log.job_id))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(log.end)
        assert await fast == list(range(1, 103))
        return seen + [e.id async for e in slow]

    assert run(main()) == list(range(1, 103))


def test_a_deleted_job_ends_its_followers_with_gone(log):
    log.write(2)

    async def main():
        tail = EventTail(log.db, poll_s=0.01)
        follower = asyncio.create_task(numbers(tail, log.job_id))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(log.delete)
        with pytest.raises(GoneError):
            await follower
        with pytest.raises(GoneError):
            await numbers(tail, log.job_id)

    run(main())


def test_nobody_following_means_no_polling(log):
    async def main():
        tail = EventTail(log.db, poll_s=0.01)
        log.write(1)
        follower = tail.follow(log.job_id)
        await anext(follower)
        await follower.aclose()
        assert tail._poller is not None
        await tail._poller
        log.write(1)
        log.end()
        return await numbers(tail, log.job_id)

    assert run(main()) == [1, 2, 3]


def test_an_interrupted_follower_has_told_what_it_knew_and_others_may_begin(log):
    log.write(3)

    async def main():
        tail = EventTail(log.db, poll_s=0.01)
        seen = []

        async def follow():
            async for each in tail.follow(log.job_id):
                seen.append(each.id)

        follower = asyncio.create_task(follow())
        while len(seen) < 3:
            await asyncio.sleep(0.01)
        tail.interrupt()
        with pytest.raises(ServiceUnavailableError):
            await follower
        assert (seen, tail.followers) == ([1, 2, 3], 0)
        next_one = asyncio.create_task(numbers(tail, log.job_id, after=3))
        await asyncio.to_thread(log.write)
        await asyncio.to_thread(log.end)
        return await next_one

    assert run(main()) == [4, 5]
