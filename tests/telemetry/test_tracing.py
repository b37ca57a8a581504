"""Traces: on when a collector is named, one for each job, nothing at all otherwise."""

from __future__ import annotations

import sys
import time
import uuid

import pytest

from arkor_ray.errors import InvalidRequestError
from arkor_ray.telemetry import tracing
from arkor_ray.telemetry.carried import carried
from tests.test_imports import loaded_by

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_off_nothing_is_imported_and_spans_are_none():
    code = "from arkor_ray.telemetry import tracing\ntracing.configure()\nwith tracing.span('a') as s: s.set(b=1)"
    assert "opentelemetry" not in loaded_by(code)
    with tracing.span("a") as span:
        assert span.traceparent is None and tracing.traceparent() is None and carried() == {}


def test_a_span_goes_on_from_the_callers_trace(spans):
    with tracing.span("outer", parent=CALLER, kind="SERVER", http__route="/v1"):
        along = tracing.traceparent()
        with tracing.span("inner"):
            pass
    inner, outer = spans()
    assert f"{outer.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{outer.parent.span_id:016x}" == CALLER.split("-")[2]
    assert inner.parent.span_id == outer.context.span_id
    assert dict(outer.attributes) == {"http.route": "/v1"}
    assert along == f"00-{outer.context.trace_id:032x}-{outer.context.span_id:016x}-01"


@pytest.mark.parametrize("given", ["", "nonsense", "00-00000000000000000000000000000000-b7ad6b7169203331-01"])
def test_a_header_that_is_no_trace_begins_one(spans, given):
    with tracing.span("outer", parent=given):
        pass
    [span] = spans()
    assert span.parent is None and span.context.is_valid


def test_the_current_trace_is_in_log_lines(spans):
    with tracing.span("outer", parent=CALLER):
        assert tracing.current_ids()["trace_id"] == CALLER.split("-")[1]
    assert tracing.current_ids() == {}


def test_an_error_marks_its_span_and_passes(spans):
    with pytest.raises(ValueError), tracing.span("fails"):
        raise ValueError("no")
    [span] = spans()
    assert not span.status.is_ok and span.events[0].name == "exception"


def test_everything_about_a_job_is_one_trace_below_its_submission(spans):
    job_id = str(uuid.uuid4())
    with tracing.span("POST /v1/jobs"):
        tracing.record_submission(job_id, arkor__model="tiny")
    with tracing.span("attempt", parent=tracing.job_traceparent(job_id)):
        pass
    now = time.monotonic()
    tracing.record("store checkpoint", now - 2, now - 1, parent=tracing.job_traceparent(job_id))
    submission, request, attempt, stored = spans()
    assert submission.context.trace_id == uuid.UUID(job_id).int
    assert {attempt.context.trace_id, stored.context.trace_id} == {submission.context.trace_id}
    assert attempt.parent.span_id == stored.parent.span_id == submission.context.span_id
    assert submission.parent is None and submission.links[0].context.span_id == request.context.span_id
    assert stored.end_time - stored.start_time == pytest.approx(1e9, rel=1e-3)


def test_a_missing_extra_names_its_cure(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InvalidRequestError, match=r"pip install 'arkor-ray\[otel\]'"):
        tracing.configure()


def test_a_protocol_that_is_not_spoken_is_refused(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(InvalidRequestError, match="only http/protobuf"):
        tracing.configure()


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_standard_variables_say_whether(monkeypatch, variables, wanted):
    for name in (*tracing.ENDPOINTS, "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracing.is_wanted() is wanted
