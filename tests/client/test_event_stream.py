from __future__ import annotations

import json

import pytest

from arkor_ray.client.event_stream import NAMED_JOB_STATUSES, EventFollower, EventStreamParser, Frame
from arkor_ray.errors import ArkorError, GoneError, NotFoundError, ServiceUnavailableError, from_wire

# The examples of the HTML standard, section 9.2.6, and the corners of its parsing rules.
STANDARD = {
    "stock ticker": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [Frame("message", "YHOO\n+2\n10")]),
    "ids and a comment": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
        [Frame("message", "first event", "1"), Frame("message", "second event", ""), Frame("message", " third event")],
    ),
    "empty data": (b"data\n\ndata\ndata\n\ndata:", [Frame("message", ""), Frame("message", "\n")]),
    "optional space": (b"data:test\n\ndata: test\n\n", [Frame("message", "test"), Frame("message", "test")]),
    "named": (
        b"event: add\ndata: 7385\n\nevent: remove\ndata: 2153\n\n",
        [Frame("add", "7385"), Frame("remove", "2153")],
    ),
    "CRLF": (b"event: a\r\ndata: 1\r\n\r\ndata: 2\r\n\r\n", [Frame("a", "1"), Frame("message", "2")]),
    "CR": (b"event: a\rdata: 1\r\rdata: 2\r\r", [Frame("a", "1"), Frame("message", "2")]),
    "mixed ends": (b"data: 1\r\n\ndata: 2\n\r\ndata: 3\r\r\n", [Frame("message", n) for n in "123"]),
    "byte order mark": ("\ufeffdata: 1\n\n".encode(), [Frame("message", "1")]),
    "only the first mark": ("\ufeff\ufeffdata: 1\n\ndata: 2\n\n".encode(), [Frame("message", "2")]),
    "cut off by the end": (b"data: 1\n\nevent: x\ndata: lost\n", [Frame("message", "1")]),
    "no data, no frame": (b"event: end\n\ndata: 1\n\n", [Frame("message", "1")]),
    "unknown fields": (b"retry: 5\nfoo: bar\ndata: 1\ndatax: 2\n\n", [Frame("message", "1")]),
    "NUL in an id": (b"id: a\0b\ndata: 1\n\n", [Frame("message", "1")]),
    "more than ASCII": ("data: grüße — 🎈\n\n".encode(), [Frame("message", "grüße — 🎈")]),
    "not UTF-8": (b"data: \xff\n\n", [Frame("message", "\ufffd")]),
}


@pytest.mark.parametrize("name", STANDARD)
def test_a_stream_cut_at_every_byte_gives_the_same_frames(name):
    stream, frames = STANDARD[name]
    for cut in range(len(stream) + 1):
        parser = EventStreamParser()
        assert parser.feed(stream[:cut]) + parser.feed(stream[cut:]) == frames, cut
    parser = EventStreamParser()
    assert [frame for byte in stream for frame in parser.feed(bytes([byte]))] == frames


def test_a_cr_ends_its_frame_without_waiting_for_the_next_byte():
    assert EventStreamParser().feed(b"data: 1\r\r") == [Frame("message", "1")]


def frame(id: int | None, type: str, **fields) -> bytes:
    head = f"id: {id}\n" if id is not None else ""
    return f"{head}event: {type}\ndata: {json.dumps({'type': type, **fields})}\n\n".encode()


LOG = [
    frame(1, "training.started"),
    *(frame(n, "training.log", step=n - 1) for n in range(2, 6)),
    frame(6, "training.completed"),
]
END = b"event: end\ndata: {}\n\n"


def test_a_stream_resumed_after_a_cut_at_every_byte_misses_and_repeats_nothing():
    stream = b"".join(LOG)
    for cut in range(len(stream)):
        follower = EventFollower(chance=lambda: 0.0)
        follower.connect()
        seen = [event.id for event in follower.receive(stream[:cut])]
        last = int(follower.connect().get("Last-Event-ID", 0))
        seen += [event.id for event in follower.receive(b"".join(LOG[last:]))]
        assert seen == [1, 2, 3, 4, 5, 6], cut
        assert follower.done


def test_an_event_counts_as_seen_only_when_the_next_one_is_asked_for():
    follower = EventFollower()
    follower.connect()
    events = follower.receive(LOG[0] + LOG[1])
    assert next(events).id == 1
    assert follower.connect() == {"Accept": "text/event-stream"}
    assert next(events).id == 2
    assert follower.connect()["Last-Event-ID"] == "1"


def test_a_replay_from_the_start_shows_no_event_twice():
    follower = EventFollower(last_event_id="3")
    follower.connect()
    assert [event.id for event in follower.receive(b"".join(LOG))] == [4, 5, 6]


def test_pings_comments_and_frames_that_are_no_json_are_no_events():
    follower = EventFollower()
    follower.connect()
    noise = b": ping\n\nevent: ping\ndata: {}\n\nid: 9\ndata: {broken\n\ndata: [1]\n\n"
    assert list(follower.receive(noise)) == []
    assert follower.connect()["Last-Event-ID"] == "9"


def test_an_event_without_id_is_shown_and_leaves_the_position():
    follower = EventFollower(last_event_id="4")
    follower.connect()
    assert [event.type for event in follower.receive(frame(None, "server.notice"))] == ["server.notice"]
    assert follower.connect()["Last-Event-ID"] == "4"


def test_the_type_in_the_data_wins_over_the_name_of_the_frame():
    follower = EventFollower()
    follower.connect()
    stream = b'event: message\ndata: {"type": "training.log", "step": 1}\n\n'
    assert [event.type for event in follower.receive(stream)] == ["training.log"]


@pytest.mark.parametrize("last", [END, LOG[5], frame(6, "training.failed", error="x"), frame(6, "training.cancelled")])
def test_a_terminal_event_or_end_is_the_end(last):
    follower = EventFollower(last_event_id="5")
    follower.connect()
    assert len(list(follower.receive(last + frame(7, "training.log", step=9)))) == (0 if last is END else 1)
    assert follower.done


def test_ids_that_are_no_numbers_are_resumed_from_as_they_are():
    follower = EventFollower()
    follower.connect()
    assert [event.id for event in follower.receive(b'id: a-7\ndata: {"type": "training.log", "step": 1}\n\n')] == [0]
    assert follower.connect()["Last-Event-ID"] == "a-7"


def test_delays_double_from_one_second_to_a_minute():
    follower = EventFollower(chance=lambda: 0.0)
    assert [follower.disconnected() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_quarter_of_a_delay_is_left_to_chance():
    follower = EventFollower(chance=lambda: 1.0)
    assert [follower.disconnected() for _ in range(2)] == [0.75, 1.5]


def test_only_an_event_starts_the_delays_anew():
    follower = EventFollower(chance=lambda: 0.0)
    for error in (None, ServiceUnavailableError("down"), NotFoundError("not yet")):
        follower.disconnected(error)
    follower.connect()
    list(follower.receive(b"event: ping\ndata: {}\n\n"))
    assert follower.disconnected() == 8
    list(follower.receive(LOG[0]))
    assert follower.disconnected() == 1


@pytest.mark.parametrize("status", [401, 403, 410, 426])
def test_permanent_statuses_are_raised(status):
    error = from_wire(status, {"error": "no"})
    with pytest.raises(ArkorError) as raised:
        EventFollower().disconnected(error)
    assert raised.value is error


@pytest.mark.parametrize("status", [400, 404, 408, 409, 429, 500, 502, 503])
def test_other_statuses_are_retried(status):
    assert EventFollower(chance=lambda: 0.0).disconnected(from_wire(status, {"error": "later"})) == 1


def test_a_named_job_that_was_there_is_not_given_up_for_what_a_proxy_says_of_a_service_that_is_replaced():
    named, gone = EventFollower(permanent=NAMED_JOB_STATUSES, chance=lambda: 0.0), NotFoundError("no such route")
    with pytest.raises(NotFoundError):
        named.disconnected(gone)
    assert list(named.receive(b": ping\n\n")) == []
    assert named.disconnected(gone) == 1
    with pytest.raises(ArkorError, match="revoked"):
        named.disconnected(from_wire(401, {"error": "revoked"}))


def test_which_statuses_are_permanent_can_be_told():
    with pytest.raises(NotFoundError):
        EventFollower(permanent=frozenset({404})).disconnected(NotFoundError("no such job"))
    assert EventFollower(permanent=frozenset({404})).disconnected(GoneError("gone"))
