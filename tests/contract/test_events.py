"""The job event stream, byte for byte: its frames, its order, and where a reader may take it up again."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.contract.conftest import SAVE_EVERY, STEPS, Recorded
from tests.contract.wire import ISO, UNKNOWN_ID, Caller, assert_error, exchange, frames, request_bytes
from tests.servers.arkor import RunningService

pytestmark = pytest.mark.integration

END = b"event: end\ndata: {}\n\n"
PING = b"event: ping\ndata: {}\n\n"
SILENCE_S = 25.0  # 15 by the contract; a machine under load comes late


def test_stream_is_event_frames_and_then_the_end(log: bytes) -> None:
    *events, end = frames(log)
    assert log.endswith(END) and end.id is None
    assert [frame.id for frame in events] == list(range(1, len(events) + 1))
    assert not [frame for frame in events if frame.event in (None, "error", "ping", "end")]


def test_every_event_names_its_type_twice_and_its_job_and_time(log: bytes, finished: Recorded) -> None:
    for frame in frames(log)[:-1]:
        assert frame.json["type"] == frame.event
        assert frame.json["jobId"] == finished.id and ISO.fullmatch(frame.json["timestamp"])


def test_fields_are_those_that_the_client_reads(log: bytes) -> None:
    for frame in frames(log)[:-1]:
        data = frame.json
        if frame.event == "training.log":
            assert isinstance(data["step"], int)
            for name in ("loss", "evalLoss", "learningRate", "epoch", "samplesPerSecond"):
                assert data.get(name) is None or isinstance(data[name], (int, float))
        elif frame.event == "checkpoint.saved":
            assert isinstance(data["step"], int) and data["artifacts"]
        elif frame.event == "training.completed":
            assert set(data["metrics"]) >= {"finalLoss", "totalSteps", "totalTime"}
            for artifact in data["artifacts"]:
                assert {"pathname", "kind", "sizeBytes", "url"} <= set(artifact)


def test_events_are_in_order(log: bytes) -> None:
    events = frames(log)[:-1]
    names = [frame.event for frame in events]
    assert names[0] == "training.started" and names.count("training.started") == 1
    assert names[-1] == "training.completed" and names.count("training.completed") == 1
    assert not {"training.failed", "training.cancelled"} & set(names)
    logged = [frame.json["step"] for frame in events if frame.event == "training.log"]
    assert sorted(set(logged)) == list(range(1, STEPS + 1)) and logged == sorted(logged)
    saved = [frame.json["step"] for frame in events if frame.event == "checkpoint.saved"]
    assert saved == list(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY))
    for step in saved:
        places = [i for i, frame in enumerate(events) if frame.json.get("step") == step]
        kinds = [names[i] for i in places]
        assert kinds.index("training.log") < kinds.index("checkpoint.saved")


def test_who_was_there_all_the_time_got_the_same_bytes(finished: Recorded, log: bytes) -> None:
    assert finished.body.replace(PING, b"") == log


def test_live_stream_has_its_headers_at_once_and_never_falls_silent(finished: Recorded) -> None:
    assert finished.headers["content-type"].startswith("text/event-stream")
    assert finished.headers["cache-control"] == "no-cache"
    times = [time for time, _ in finished.received]
    assert max(after - before for before, after in pairwise(times)) < SILENCE_S


def test_reader_takes_up_the_stream_at_every_position(log: bytes, finished: Recorded, caller: Caller) -> None:
    ends, position = [0], 0
    for number in range(1, len(frames(log))):
        position = log.index(b"\n\n", position) + 2
        ends.append(position)
        assert log[ends[-2] :].startswith(b"id: %d\n" % number)
    assert log[ends[-1] :] == END
    for number, start in enumerate(ends[1:], start=1):
        assert caller.events(finished.id, str(number)) == log[start:], number


@pytest.mark.parametrize("unknown", ["0", "999999", "-1", "1.5", "abc", "18446744073709551616", "01e1", "%31", "1;2"])
def test_unknown_position_replays_from_the_start(log: bytes, finished: Recorded, caller: Caller, unknown: str) -> None:
    assert caller.events(finished.id, unknown) == log


def test_stream_as_the_socket_gives_it(service: RunningService, finished: Recorded, caller: Caller, log: bytes) -> None:
    path = f"/v1/jobs/{finished.id}/events/stream?orgSlug={caller.org_slug}&projectSlug={caller.project_slug}"
    token = f"Authorization: Bearer {caller.token}"
    request = request_bytes("GET", path, token, "Accept: text/event-stream")
    # The connection can be used again: the stream had an end of its own.
    first, second = exchange(service.url, request, request)
    assert first.status_line == "HTTP/1.1 200 OK" and first.headers["transfer-encoding"] == "chunked"
    assert "content-length" not in first.headers and "content-encoding" not in first.headers
    assert first.body == second.body == log


def test_readers_are_independent(finished: Recorded, caller: Caller, log: bytes) -> None:
    path = f"/v1/jobs/{finished.id}/events/stream"
    with caller.stream("GET", path) as slow, caller.stream("GET", path) as fast:
        assert fast.read() == log
        assert slow.read() == log


def test_unknown_job_is_404_and_410_for_who_has_seen_events_of_it(caller: Caller) -> None:
    path = f"/v1/jobs/{UNKNOWN_ID}/events/stream"
    assert_error(caller.get(path), 404, "not_found")
    assert_error(caller.get(path, headers={"Last-Event-ID": "3"}), 410, "gone")
