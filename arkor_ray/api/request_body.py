"""Request bodies: how large they may be, and which JSON they may hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arkor_ray.api.error_handlers import UnfitBodyError, error_response
from arkor_ray.errors import PayloadTooLargeError
from arkor_ray.schemas.base import UNSTORABLE

_UNSTORABLE_TEXT = "has a NUL character or half a surrogate pair, which cannot be stored; leave it out"
_SHOWN_OF_FIELD = 200  # characters


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
        if b"\0" in body:  # UTF-16 and UTF-32 have it in every brace, JSON in UTF-8 nowhere
            raise UnfitBodyError("The body has NUL bytes; send JSON as UTF-8")
        try:
            return _parse(body.decode("utf-8-sig"))  # JSON should have no byte order mark, and readers may let it pass
        except RecursionError as error:
            raise UnfitBodyError("The body is nested too deeply") from error
        except UnicodeDecodeError as error:
            raise UnfitBodyError("The body is not UTF-8; send JSON as UTF-8") from error


def _parse(text: str) -> Any:
    """Raises UnfitBodyError that names the field, JSONDecodeError for what is no JSON, RecursionError."""
    no_numbers: list[_NoNumber] = []

    def no_number(reason: str) -> _NoNumber:
        no_numbers.append(_NoNumber(reason))
        return no_numbers[-1]

    def as_constant(name: str) -> _NoNumber:
        return no_number(f"{name} is no number of JSON; send a finite number, or null")

    def as_float(written: str) -> float | _NoNumber:
        number = float(written)
        if math.isfinite(number):
            return number
        return no_number(
            f"{written[:40]} is too large for a number of 64 bits, which ends at 1.8e308; send a smaller one"
        )

    value = json.loads(text, parse_constant=as_constant, parse_float=as_float)
    found = _unfit(value) if no_numbers or "\\u" in text else None
    if found is not None:
        reason, path = found
        field = ".".join(reversed(path))[:_SHOWN_OF_FIELD]
        raise UnfitBodyError(f"{field or 'The body'}: {reason}", field or None)
    if no_numbers:  # of a field that is there once more, which is the one that counts
        raise UnfitBodyError(f"The body: {no_numbers[0].reason}")
    return value


@dataclass(frozen=True)
class _NoNumber:
    """Stands where a number should be."""

    reason: str


def _unfit(value: Any) -> tuple[str, list[str]] | None:
    """Why the first unfit value in `value` is none, and the names that lead to it, the innermost first."""
    if isinstance(value, _NoNumber):
        return value.reason, []
    if isinstance(value, str):
        return (_UNSTORABLE_TEXT, []) if UNSTORABLE.search(value) else None
    if isinstance(value, dict):
        if any(map(UNSTORABLE.search, value)):
            return f"the name of a field in it: {_UNSTORABLE_TEXT}", []
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return None
    for name, item in items:
        if (found := _unfit(item)) is not None:
            found[1].append(str(name))
            return found
    return None
