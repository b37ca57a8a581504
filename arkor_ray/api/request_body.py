"""Request bodies: how large they may be, and which JSON they may hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arkor_ray.api.error_handlers import error_response
from arkor_ray.errors import InvalidRequestError, PayloadTooLargeError
from arkor_ray.schemas.base import UNSTORABLE


class BodyLimit:
    """Reads the whole body before anything else happens, and answers 413 as soon as it is too long."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if announced.isdigit() and int(announced[:20]) > self._max_bytes:
            return await self._refuse(scope, receive, send)
        chunks: list[bytes] = []
        size = 0
        while True:
            last = await receive()
            if last["type"] != "http.request":
                break  # the client left; whoever reads the body learns so
            chunks.append(last.get("body", b""))
            size += len(chunks[-1])
            if size > self._max_bytes:
                return await self._refuse(scope, receive, send)
            if not last.get("more_body", False):
                last = {"type": "http.request", "body": b"".join(chunks), "more_body": False}
                break
        pending: list[Message] = [last]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = PayloadTooLargeError(f"The body is larger than {self._max_bytes} bytes, the limit of this server")
        # The rest of the body stays unread, so the connection cannot be used again.
        await error_response(error, scope, {"Connection": "close"})(scope, receive, send)


class StrictJsonRoute(APIRoute):
    """Refuses what Python calls JSON and databases and other readers do not: NaN, infinities, NUL, half surrogates."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            value = json.loads(body, parse_constant=_refuse_constant)
            if b"\\u" in body:
                _check_strings(value)
        except RecursionError as error:
            raise _refusal("The body is nested too deeply") from error
        except UnicodeDecodeError as error:
            raise _refusal("The body is not UTF-8") from error
        return value


def _refuse_constant(name: str) -> Any:
    raise _refusal(f"The body is not valid JSON: {name} is no number of JSON")


def _check_strings(value: Any) -> None:
    if isinstance(value, str):
        if UNSTORABLE.search(value):
            raise _refusal("The body has a string with a NUL character or half a surrogate pair")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key)
            _check_strings(item)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item)


def _refusal(sentence: str) -> HTTPException:
    # FastAPI lets its own exception class pass while it reads a body, and rewords every other one.
    return HTTPException(InvalidRequestError.http_status, sentence)
