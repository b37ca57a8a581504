"""What every request leaves behind, whatever becomes of it: its id in the answer, a count, a duration, a span."""

from __future__ import annotations

import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arkor_ray.telemetry import logs, tracing
from arkor_ray.telemetry.metrics import API_REQUEST_SECONDS, API_REQUESTS

_UNFIT = re.compile(rb"[^A-Za-z0-9._:/+=-]+")  # for a log line
MAX_REQUEST_ID = 128
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
CLIENT_LEFT = 499  # no status of HTTP; what proxies log for a client that left before its answer
NO_ROUTE = "none"


class Observe:
    """Outside of whatever answers, also of what turns errors into answers.

    Args:
        answers_id: whether answers are given the X-Request-Id here; Ray Serve's proxy gives it to them by itself.
    """

    def __init__(self, app: ASGIApp, *, answers_id: bool) -> None:
        self._app = app
        self._answers_id = answers_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began = time.monotonic()
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))
        method = scope["method"] if scope["method"] in METHODS else "other"  # anybody may make one up
        status = CLIENT_LEFT

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._answers_id:
                    message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                API_REQUEST_SECONDS.observe(time.monotonic() - began, method=method, route=_route(scope))
            await send(message)

        parent = headers.get(b"traceparent", b"").decode("latin-1")
        with logs.about(request_id=request_id), tracing.span(method, parent=parent, kind="SERVER") as span:
            try:
                await self._app(scope, receive, tell)
            finally:
                route = _route(scope)
                API_REQUESTS.add(method=method, route=route, status=str(status))
                span.rename(f"{method} {route}")
                span.set(
                    http__request__method=method,
                    http__route=route,
                    http__response__status_code=status,
                    arkor__request_id=request_id,
                )
                if status >= 500:
                    span.fail(f"status {status}")


def _request_id(given: bytes) -> str:
    """What of the caller's may stand in a log; a new one where that is nothing."""
    return _UNFIT.sub(b"", given)[:MAX_REQUEST_ID].decode() or uuid.uuid4().hex


def _route(scope: Scope) -> str:
    """The template, known once the routes were asked: paths have ids, and would be without number."""
    return getattr(scope.get("route"), "path", NO_ROUTE)
