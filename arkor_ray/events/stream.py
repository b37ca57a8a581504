"""Reading a job's events: replay what is stored, then follow what comes.

One poller per process asks the database for all followed jobs at once and wakes their followers, so 2,000 streams cost one
small query every `poll_s` and no thread each. A follower keeps only its own position: a slow one falls back to reading the
database and slows nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from arkor_ray.db.session import Database
from arkor_ray.db.tables import EventRow, JobRow
from arkor_ray.errors import GoneError, ServiceUnavailableError
from arkor_ray.schemas.event import TERMINAL, Event
from arkor_ray.schemas.job import JobStatus

logger = logging.getLogger(__name__)

PAGE = 500  # events read from the database at a time


class EventTail:
    """Follows the event logs of any number of jobs for any number of followers, on one event loop.

    Args:
        poll_s: seconds between two looks at the database while somebody follows.
    """

    def __init__(self, db: Database, poll_s: float = 0.05) -> None:
        self._db = db
        self._poll_s = poll_s
        self._channels: dict[str, _Channel] = {}
        self._poller: asyncio.Task[None] | None = None

    async def follow(self, job_id: str, after: int = 0) -> AsyncGenerator[Event]:
        """Events with numbers above `after`, in order, until the terminal one. An `after` never given out means 0.

        Raises GoneError if the job does not exist or is deleted meanwhile, and ServiceUnavailableError once `interrupt` is
        called: whoever follows can go on elsewhere by the number of the last event.
        """
        last, ended = await asyncio.to_thread(self._position, job_id)
        position = after if 0 <= after <= last else 0
        if ended and position == last:
            return
        channel = self._join(job_id, last)
        try:
            while True:
                changed = channel.changed  # taken before reading, so that no wake-up is missed
                events = channel.since(position)
                if events is None:
                    events = await asyncio.to_thread(self.read, job_id, position)
                for event in events:
                    yield event
                    position = event.id
                    if event.type in TERMINAL:
                        return
                if not events:
                    if channel.gone:
                        raise GoneError(f"Job {job_id} was deleted")
                    if channel.interrupted:
                        raise ServiceUnavailableError("This process takes no more part", retry_after=1)
                    await changed.wait()
        finally:
            self._leave(job_id, channel)

    def interrupt(self) -> None:
        """Ends every stream under way, once it has told what it knows. Those that begin afterwards are followed as ever."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.interrupted = True
            channel.wake()

    @property
    def followers(self) -> int:
        """How many follow a job now."""
        return sum(channel.followers for channel in list(self._channels.values()))

    def read(self, job_id: str, after: int = 0, limit: int | None = PAGE) -> Sequence[Event]:
        """Stored events above `after`, in order. Blocks on the database."""
        with self._db.read() as session:
            return read_events(session, job_id, after, limit)

    def _position(self, job_id: str) -> tuple[int, bool]:
        with self._db.read() as session:
            row = session.execute(select(JobRow.last_event, JobRow.status).where(JobRow.id == job_id)).one_or_none()
        if row is None:
            raise GoneError(f"Job {job_id} does not exist")
        return row.last_event, JobStatus(row.status).is_terminal

    def _join(self, job_id: str, last: int) -> _Channel:
        channel = self._channels.setdefault(job_id, _Channel(last))
        channel.followers += 1
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        return channel

    def _leave(self, job_id: str, channel: _Channel) -> None:
        channel.followers -= 1
        if channel.followers == 0 and self._channels.get(job_id) is channel:
            del self._channels[job_id]

    async def _poll(self) -> None:
        """Ends by itself when nobody follows; the next follower starts it again."""
        while self._channels:
            try:
                await self._look()
            except Exception:
                # A database that restarts is waited for: followers just hear nothing until it is back. Nor may anything
                # else end the one poller that all streams of this process depend on.
                logger.warning("Could not read new events; trying again in 1 s", exc_info=True)
                await asyncio.sleep(1)
            await asyncio.sleep(self._poll_s)

    async def _look(self) -> None:
        positions = {job_id: channel.last for job_id, channel in self._channels.items()}
        news, gone = await asyncio.to_thread(self._news, positions)
        for job_id in gone:
            if channel := self._channels.pop(job_id, None):
                channel.gone = True
                channel.wake()
        for job_id, events in news.items():
            if channel := self._channels.get(job_id):
                channel.push(events)

    def _news(self, positions: dict[str, int]) -> tuple[dict[str, Sequence[Event]], list[str]]:
        """New events by job, and jobs that no longer exist. Runs in a thread."""
        news: dict[str, Sequence[Event]] = {}
        with self._db.read() as session:
            query = select(JobRow.id, JobRow.last_event).where(JobRow.id.in_(positions))
            newest = {row.id: row.last_event for row in session.execute(query)}
            for job_id, last in newest.items():
                if last > positions[job_id]:
                    news[job_id] = read_events(session, job_id, positions[job_id], PAGE)
        return news, [job_id for job_id in positions if job_id not in newest]


def read_events(session: Session, job_id: str, after: int = 0, limit: int | None = None) -> list[Event]:
    """Stored events of a job above number `after`, in order."""
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.number > after).order_by(EventRow.number)
    return [Event(id=row.number, type=row.type, data=row.data) for row in session.scalars(query.limit(limit))]


@dataclass
class _Channel:
    """What the poller knows about one followed job: its newest events, and who waits."""

    last: int
    recent: deque[Event] = field(default_factory=lambda: deque(maxlen=2 * PAGE))
    followers: int = 0
    gone: bool = False
    interrupted: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def push(self, events: Sequence[Event]) -> None:
        if not events:  # the job was deleted between the two questions
            return
        self.recent.extend(events)
        self.last = events[-1].id
        self.wake()

    def wake(self) -> None:
        waiting, self.changed = self.changed, asyncio.Event()
        waiting.set()

    def since(self, position: int) -> Sequence[Event] | None:
        """Events above `position`, [] if there is none yet, None if they must be read from the database."""
        if position >= self.last:
            return []
        if not self.recent or position < self.recent[0].id - 1:
            return None
        return [event for event in self.recent if event.id > position]
