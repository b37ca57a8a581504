"""Events: their form on the wire, which is JSON whatever the training loop computed."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

from arkor_ray.schemas.base import iso
from arkor_ray.schemas.event import TERMINAL, Event, event_data, log_fields

NOON = datetime(2026, 8, 7, 12, 0, tzinfo=UTC)


def test_data_has_what_every_event_has() -> None:
    assert event_data("training.log", "job", NOON, {"step": 3}) == {
        "type": "training.log",
        "jobId": "job",
        "timestamp": "2026-08-07T12:00:00.000Z",
        "step": 3,
    }


def test_numbers_that_are_no_json_become_null_at_any_depth() -> None:
    nan, infinity = float("nan"), float("-inf")
    data = event_data("training.log", "job", NOON, {"loss": nan, "metrics": {"a": [1.5, infinity], "b": (nan,)}})
    assert (data["loss"], data["metrics"]) == (None, {"a": [1.5, None], "b": [None]})
    json.dumps(data, allow_nan=False)


def test_times_are_utc_with_milliseconds_wherever_they_come_from() -> None:
    tokyo = timezone(timedelta(hours=9))
    for moment in (NOON, NOON.astimezone(tokyo), NOON.replace(tzinfo=None)):
        assert iso(moment) == "2026-08-07T12:00:00.000Z"


def test_step_is_that_of_the_data() -> None:
    assert Event(id=1, type="training.log", data={"step": 3}).step == 3
    assert Event(id=1, type="training.started", data={}).step is None


def test_three_events_end_a_job() -> None:
    assert {"training.completed", "training.failed", "training.cancelled"} == TERMINAL


def test_a_log_entry_is_told_from_the_evaluation_at_its_step():
    assert log_fields({"step": 4, "loss": 0.5, "learning_rate": 1e-3, "samples_per_second": 9.0}) == (
        "log:4", {"step": 4, "loss": 0.5, "learningRate": 1e-3, "samplesPerSecond": 9.0},
    )  # fmt: skip
    assert log_fields({"step": 4, "eval_loss": 0.7}) == ("eval:4", {"step": 4, "evalLoss": 0.7})
