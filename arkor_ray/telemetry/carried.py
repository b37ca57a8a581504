"""What goes along with a request from one process to the next: its id and its trace."""

from __future__ import annotations

from arkor_ray.telemetry import logs, tracing


def carried() -> dict[str, str]:
    """Of the current task's request, as JSON."""
    known = {"request_id": logs.subject().get("request_id"), "traceparent": tracing.traceparent()}
    return {name: value for name, value in known.items() if value is not None}
