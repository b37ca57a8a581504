"""Errors as the contract's envelope, on every route and for every cause; on OpenAI's routes as OpenAI's envelope.

A 4xx carries the sentence that was raised. A 5xx that nobody wrote for users says only that it happened and under which
number the server's log has the rest.
"""

from __future__ import annotations

import logging
import uuid
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arkor_ray.db.session import DATABASE_AWAY
from arkor_ray.errors import (
    ArkorError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    ServiceUnavailableError,
    StorageError,
)
from arkor_ray.schemas.base import invalid_request

logger = logging.getLogger(__name__)

OPENAI_PATHS = ("/v1/chat/completions", "/v1/models", "/e/")  # what their clients read, and what they read of an error


class UnfitBodyError(HTTPException):
    """While it reads a body FastAPI lets this class pass, and rewords every other one. `param` is the field at fault."""

    def __init__(self, sentence: str, param: str | None = None) -> None:
        super().__init__(InvalidRequestError.http_status, sentence)
        self.param = param


def described(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For the description of the API: errors that have `body`."""
    return {
        "4XX": {"model": body, "description": "A request that cannot be served"},
        "5XX": {"model": body, "description": "A fault or a part that is away; worth another try"},
    }


def install(app: FastAPI) -> None:
    for cause in (ArkorError, HTTPException, RequestValidationError, *DATABASE_AWAY):
        app.add_exception_handler(cause, _answer)
    app.add_middleware(CatchAll)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        # The framework's own: no such route, a method that the route lacks (its Allow header stays), an unreadable body.
        return error_response(_framework_error(request, error), request.scope, dict(error.headers or {}))
    return error_response(public_error(error), request.scope)


def error_response(error: ArkorError, scope: Scope, headers: dict[str, str] | None = None) -> JSONResponse:
    """The answer that `error` is to the request of `scope`."""
    headers = headers or {}
    if error.http_status == 401:
        headers.setdefault("WWW-Authenticate", "Bearer")
    if error.retry_after is not None:
        headers.setdefault("Retry-After", str(max(1, round(error.retry_after))))
    body = error.to_openai() if scope["path"].startswith(OPENAI_PATHS) else error.to_wire()
    return JSONResponse(body, error.http_status, headers)


def public_error(error: Exception) -> ArkorError:
    """What a user may know of `error`; the rest goes to the log."""
    if isinstance(error, RequestValidationError):
        return _validation_error(error)
    if isinstance(error, StorageError):
        return _logged(error, StorageError("The object store does not answer as it should; try again", retry_after=5))
    if isinstance(error, ArkorError) and (error.http_status < 500 or isinstance(error, ServiceUnavailableError)):
        return error
    if isinstance(error, DATABASE_AWAY):
        return _logged(error, ServiceUnavailableError("The database cannot be reached; try again", retry_after=2))
    return _logged(error, InternalError("This is a fault of the server, not of your request"))


def _logged(error: Exception, public: ArkorError) -> ArkorError:
    number = uuid.uuid4().hex[:12]
    logger.error("Error %s", number, exc_info=error)
    return type(public)(f"{public.message} (error {number} in the server's log)", **public.fields)


def _framework_error(request: Request, error: HTTPException) -> ArkorError:
    if error.status_code == 404:
        return NotFoundError(f"No route {request.method} {request.url.path}")
    if error.status_code == 405:
        return ArkorError(f"{request.url.path} has no {request.method}", code="method_not_allowed", status=405)
    if error.status_code == 413:
        return PayloadTooLargeError(str(error.detail))
    param = error.param if isinstance(error, UnfitBodyError) else None
    return InvalidRequestError(str(error.detail), status=error.status_code, param=param)


def _validation_error(error: RequestValidationError) -> InvalidRequestError:
    """One sentence that names the field: "name: …" for the body, "orgSlug: …" for the query."""

    class Findings:
        def errors(self, **_: Any) -> list[Any]:
            return [{**finding, "loc": finding["loc"][1:]} for finding in error.errors()]

    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return InvalidRequestError(f"The body is not valid JSON: {first['ctx']['error']}")
    if tuple(first["loc"]) == ("body",) and first["type"] != "value_error":  # not a rule about several of its fields
        return InvalidRequestError("The body must be a JSON object, sent with Content-Type: application/json")
    return invalid_request(cast(ValidationError, Findings()))


class CatchAll:
    """The last resort. Outside of FastAPI's own, which would answer in plain text and raise once more."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except ClientDisconnect:
            logger.debug("The client left %s", scope.get("path"))
        except Exception as error:
            if started or scope["type"] != "http":
                raise  # too late for a status: the connection must end as broken
            await error_response(public_error(error), scope)(scope, receive, send)
