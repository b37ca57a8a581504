"""Traces by OpenTelemetry, from a request to the engine, and from a job's submission to its checkpoints.

On where `OTEL_EXPORTER_OTLP_ENDPOINT` (or its form for traces alone) names a collector; the other `OTEL_*` variables mean what
the standard says. Off, a span costs a function call, and OpenTelemetry is not even imported.

A request's trace goes on from the caller's `traceparent`. A job's is made from the job's id, so that every process that has to
do with the job knows it without being told.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from arkor_ray.errors import InvalidRequestError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

Attribute = str | int | float | bool
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
FLUSH_MS = 5000

_provider: TracerProvider | None = None
_tracer: Any = None
_next_ids: ContextVar[tuple[int, int] | None] = ContextVar("arkor_next_span_ids", default=None)


def is_wanted() -> bool:
    """Whether the environment names a collector and does not say no."""
    named = any(os.environ.get(name) for name in ENDPOINTS)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return named and not disabled and os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "none"


def configure() -> None:
    """Begins to trace in this process, if that is wanted. Raises InvalidRequestError that names the remedy."""
    if _provider is not None or not is_wanted():
        return
    protocol = next((os.environ[name] for name in PROTOCOLS if os.environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise InvalidRequestError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: only http/protobuf is spoken; collectors listen for it on port 4318"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise InvalidRequestError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is set, but {error.name} is not installed: pip install 'arkor-ray[otel]'"
        ) from error
    export_to(OTLPSpanExporter())


def export_to(exporter: SpanExporter | None) -> None:
    """Spans of this process go to `exporter` from now on; None: there are none."""
    global _provider, _tracer
    if _provider is not None:
        _provider.shutdown()
    if exporter is None:
        _provider = _tracer = None
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(RandomIdGenerator):
        """Random, but for the first span of a job."""

        def generate_trace_id(self) -> int:
            given = _next_ids.get()
            return given[0] if given else super().generate_trace_id()

        def generate_span_id(self) -> int:
            given = _next_ids.get()
            return given[1] if given else super().generate_span_id()

    # Our own, not OpenTelemetry's global one, which belongs to whoever runs this process: Ray, or a test.
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {"service.name": "arkor-ray"})
    _provider = TracerProvider(resource=resource, id_generator=Ids())
    _provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = _provider.get_tracer("arkor_ray")


def flush() -> None:
    """Sends what is still here, for a process that is about to end; waits some seconds at most."""
    if _provider is not None:
        _provider.force_flush(FLUSH_MS)


class Span:
    """What code does to a span; this one is none."""

    @property
    def traceparent(self) -> str | None:
        """For what comes below it, here or in another process."""
        return None

    def set(self, **attributes: Attribute | None) -> None:
        """Attributes, with double underscores for dots; None is left out."""

    def rename(self, name: str) -> None:
        """For what was not known when it began."""

    def fail(self, description: str) -> None:
        """Says that what the span stands for went wrong."""

    def make_current(self) -> None:
        """To the end of the current task. For async generators, in which a `with` may end in another task."""

    def end(self) -> None:
        """Only for one of `start`."""


class _RealSpan(Span):
    def __init__(self, span: Any) -> None:
        self._span = span

    @property
    def traceparent(self) -> str | None:
        return _format(self._span.get_span_context())

    def set(self, **attributes: Attribute | None) -> None:
        self._span.set_attributes(_named(attributes))

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def fail(self, description: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_status(Status(StatusCode.ERROR, description))

    def make_current(self) -> None:
        from opentelemetry.context import attach
        from opentelemetry.trace import set_span_in_context

        attach(set_span_in_context(self._span))

    def end(self) -> None:
        self._span.end()


_NO_SPAN = Span()


@contextlib.contextmanager
def span(
    name: str, *, parent: str | None = None, kind: str = "INTERNAL", **attributes: Attribute | None
) -> Iterator[Span]:
    """A span as long as the block, current within it; an exception is recorded and passes on. Not for async generators.

    Args:
        parent: a traceparent from elsewhere; absent: the current span.
        kind: of opentelemetry.trace.SpanKind.
    """
    if _tracer is None:
        yield _NO_SPAN
        return
    from opentelemetry.trace import use_span

    made = _start(name, parent, kind, None, attributes)
    with use_span(made, end_on_exit=True):
        yield _RealSpan(made)


def start(name: str, *, parent: str | None = None, kind: str = "INTERNAL", **attributes: Attribute | None) -> Span:
    """As `span`, without being current; the caller ends it."""
    return _NO_SPAN if _tracer is None else _RealSpan(_start(name, parent, kind, None, attributes))


def record(name: str, began: float, ended: float, *, parent: str | None = None, **attributes: Attribute | None) -> None:
    """A span that is over, between two moments of `time.monotonic()`."""
    if _tracer is not None:
        offset = time.time() - time.monotonic()
        _start(name, parent, "INTERNAL", int((began + offset) * 1e9), attributes).end(int((ended + offset) * 1e9))


def traceparent() -> str | None:
    """The current span, for another process to go on from; None where there is none."""
    if _tracer is None:
        return None
    from opentelemetry.trace import get_current_span

    return _format(get_current_span().get_span_context())


def current_ids() -> dict[str, str]:
    """trace_id and span_id for a log line; {} where there is no span."""
    parts = (traceparent() or "").split("-")
    return {"trace_id": parts[1], "span_id": parts[2]} if len(parts) == 4 else {}


def job_traceparent(job_id: str) -> str:
    """The first span of the job's trace: `record_submission` makes it, all others come below it."""
    trace_id, span_id = _job_ids(job_id)
    return f"00-{trace_id:032x}-{span_id:016x}-01"


def record_submission(job_id: str, **attributes: Attribute | None) -> None:
    """The first span of a job's trace, linked to the request that brought the job."""
    if _tracer is None:
        return
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, get_current_span

    request = get_current_span().get_span_context()
    token = _next_ids.set(_job_ids(job_id))
    try:
        _tracer.start_span(
            "submit job",
            context=Context(),
            links=[Link(request)] if request.is_valid else [],
            attributes=_named({"arkor__job_id": job_id, **attributes}),
        ).end()
    finally:
        _next_ids.reset(token)


def _start(name: str, parent: str | None, kind: str, start_ns: int | None, attributes: dict[str, Any]) -> Any:
    from opentelemetry.trace import SpanKind

    context = None
    if parent is not None:
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": parent}, context=Context())
    return _tracer.start_span(
        name, context=context, kind=SpanKind[kind], start_time=start_ns, attributes=_named(attributes)
    )


def _format(context: Any) -> str | None:
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _job_ids(job_id: str) -> tuple[int, int]:
    digest = hashlib.sha256(job_id.encode()).digest()
    try:
        trace_id = uuid.UUID(job_id).int
    except ValueError:
        trace_id = int.from_bytes(digest[8:24], "big")
    return trace_id or 1, int.from_bytes(digest[:8], "big") or 1


def _named(attributes: dict[str, Attribute | None]) -> dict[str, Attribute]:
    return {name.replace("__", "."): value for name, value in attributes.items() if value is not None}
