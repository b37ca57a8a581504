"""Reading a job's event stream, without I/O.

`EventStreamParser` turns bytes into server-sent-event frames. `EventFollower` turns frames into a job's events, knows
which of them were seen, and decides after each disconnect whether, when and from where to connect again. Both clients
drive the same follower; they differ only in how they read a socket and how they sleep.
"""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from arkor_ray.errors import ArkorError
from arkor_ray.schemas.event import END, PING, TERMINAL, Event

#: Statuses after which a stream will never open: bad token, foreign job, stream gone, client too old.
PERMANENT_STATUSES = frozenset({401, 403, 410, 426})
#: For a reader who names the job himself, until the stream has opened once: a job just created may not be visible yet, but a
#: mistyped id never will be. Later a proxy may say 404 of a service that is being replaced.
NAMED_JOB_STATUSES = PERMANENT_STATUSES | {400, 404}

FIRST_DELAY = 1.0  # seconds before the first reconnect; doubled after each further failure
LONGEST_DELAY = 60.0
JITTER = 0.25  # the share of a delay that is left to chance, so that followers do not come back all at once


@dataclass(frozen=True)
class Frame:
    """One dispatched frame. `id` is None when the frame names none: it leaves the reader's position where it was."""

    event: str
    data: str
    id: str | None = None


class EventStreamParser:
    """The parsing rules of the HTML standard for `text/event-stream`, fed in chunks of any size.

    Lines end in LF, CRLF or CR; a leading byte order mark is dropped; a frame that the end of the stream cuts off is
    never dispatched. `retry` is not honoured: the delays are the follower's.
    """

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._line: list[str] = []
        self._at_start = True
        self._after_cr = False
        self._event = ""
        self._data: list[str] = []
        self._id: str | None = None

    def feed(self, chunk: bytes) -> list[Frame]:
        """The frames that `chunk` completes."""
        text = self._decode(chunk)
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        # A CR ends its line at once, also as the last byte of a chunk; an LF right after it belongs to it.
        if self._after_cr and text:
            self._after_cr = False
            text = text.removeprefix("\n")
        self._after_cr = self._after_cr or text.endswith("\r")
        *ended, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        frames = []
        for part in ended:
            frame = self._end_line("".join([*self._line, part]))
            self._line.clear()
            if frame is not None:
                frames.append(frame)
        self._line.append(rest)
        return frames

    def _end_line(self, line: str) -> Frame | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")  # a comment has the empty field name
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._event = value
        elif field == "id" and "\0" not in value:
            self._id = value
        return None

    def _dispatch(self) -> Frame | None:
        frame = Frame(self._event or "message", "\n".join(self._data), self._id) if self._data else None
        self._event, self._data, self._id = "", [], None
        return frame


class EventFollower:
    """One reader's way through one job's events, over any number of connections.

    `receive` is a generator: an event counts as seen once the reader asks for what comes after it. A reader that fails
    while it handles an event, and follows again, is handed that event again.
    """

    def __init__(
        self,
        *,
        last_event_id: str | None = None,
        permanent: frozenset[int] = PERMANENT_STATUSES,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.last_event_id = last_event_id or ""
        #: The terminal event was seen, or the server ended the stream.
        self.done = False
        self._permanent = permanent  # as long as nothing was received
        self._chance = chance
        self._failures = 0
        self._parser = EventStreamParser()

    def connect(self) -> dict[str, str]:
        """Begin a connection: the request's headers. Whatever half-read frame there was is forgotten."""
        self._parser = EventStreamParser()
        headers = {"Accept": "text/event-stream"}
        if self.last_event_id:
            headers["Last-Event-ID"] = self.last_event_id
        return headers

    def receive(self, chunk: bytes) -> Iterator[Event]:
        """The new events that `chunk` completes."""
        self._permanent &= PERMANENT_STATUSES
        for frame in self._parser.feed(chunk):
            if self.done:
                return
            if frame.event == END:
                self.done = True
            elif frame.event != PING and not self._was_seen(frame):
                event = _event(frame)
                if event is not None:
                    self._failures = 0
                    yield event
                    self.done = event.type in TERMINAL
                if frame.id is not None:
                    self.last_event_id = frame.id

    def disconnected(self, error: ArkorError | None = None) -> float:
        """After the end of a connection: seconds to wait before the next one.

        `error` is what kept the stream from opening, if anything did; it is raised when it is permanent. A connection
        that carried no event counts as a failure, however politely it ended.
        """
        if error is not None and error.http_status in self._permanent:
            raise error
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(self._failures, 16))
        self._failures += 1
        return delay * (1 - JITTER * self._chance())

    def _was_seen(self, frame: Frame) -> bool:
        """A server that does not know the id it was given replays from the first event."""
        return 0 < _number(frame.id) <= _number(self.last_event_id)


def _event(frame: Frame) -> Event | None:
    data = _json_object(frame.data)
    if data is None:
        return None
    kind = data.get("type")
    return Event(id=_number(frame.id), type=kind if isinstance(kind, str) else frame.event, data=data)


def _number(id: str | None) -> int:
    """Our server counts a job's events from 1; another's ids may be any text, and count as 0 here."""
    return int(id) if id and id.isascii() and id.isdecimal() else 0


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
