"""Every error of arkor-ray: raised by the server, carried over HTTP, raised again by the client.

ArkorError
├── InvalidRequestError      400  the request has a bad value; `param` names the field
│   ├── DatasetError         400  the data cannot be read, has no usable row, or no supervised token
│   └── ModelError           400  the base model cannot be loaded, trained or served
├── AuthenticationError      401  no token, or one that is unknown, expired or revoked
├── PermissionDeniedError    403  a valid token outside the organisation it belongs to
├── NotFoundError            404  no such thing in this organisation and project
├── ConflictError            409  the thing exists already, or is in a state that forbids this
│   └── AdapterError         409  an adapter that does not pass the strict loader
├── GoneError                410  it was there once and never will be again
├── PayloadTooLargeError     413  a body or a field over its limit
├── RateLimitError           429  too many at once; `retry_after` in seconds
├── TrainingError            500  training itself failed (non-finite loss, checkpoints that cannot be stored)
├── InternalError            500  a fault of ours
└── ServiceUnavailableError  503  a part is starting, restarting or full; `retry_after` in seconds
    └── StorageError         503  the object store failed
        ├── ObjectNotFoundError   no object under this key
        └── ObjectExistsError     a conditional put found the key taken

All are picklable, since they cross Ray processes, and rebuild from their wire form (`from_wire`).
"""

from __future__ import annotations

from typing import Any, ClassVar


class ArkorError(Exception):
    """Base of all. `http_status` and `code` are what crosses HTTP; `fields` is extra JSON for the body."""

    http_status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, code: str | None = None, status: int | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields
        if code is not None:
            self.code = code  # type: ignore[misc]
        if status is not None:
            self.http_status = status  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.code, self.http_status, self.fields)

    @property
    def param(self) -> str | None:
        """The request field at fault, in the wire's spelling, where there is one."""
        return self.fields.get("param")

    @property
    def retry_after(self) -> float | None:
        """Seconds after which to try again, where the server said so."""
        return self.fields.get("retry_after")

    def to_wire(self) -> dict[str, Any]:
        """The contract's envelope: `error` is a sentence that starts with the code, since only it reaches the user."""
        sentence = self.message if self.message.startswith(f"{self.code}:") else f"{self.code}: {self.message}"
        return {"error": sentence, "code": self.code, **{k: v for k, v in self.fields.items() if v is not None}}

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's envelope, whose `type` is the coarse kind that its clients know."""
        kind = _OPENAI_TYPES.get(
            self.http_status, "server_error" if self.http_status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def _rebuild(cls: type[ArkorError], message: str, code: str, status: int, fields: dict[str, Any]) -> ArkorError:
    return cls(message, code=code, status=status, **fields)


class InvalidRequestError(ArkorError):
    http_status = 400
    code = "invalid_request"


class DatasetError(InvalidRequestError):
    code = "dataset_error"


class ModelError(InvalidRequestError):
    code = "model_error"


class AuthenticationError(ArkorError):
    http_status = 401
    code = "unauthorized"


class PermissionDeniedError(ArkorError):
    http_status = 403
    code = "forbidden"


class NotFoundError(ArkorError):
    http_status = 404
    code = "not_found"


class ConflictError(ArkorError):
    http_status = 409
    code = "conflict"


class AdapterError(ConflictError):
    code = "adapter_invalid"


class GoneError(ArkorError):
    http_status = 410
    code = "gone"


class PayloadTooLargeError(ArkorError):
    http_status = 413
    code = "payload_too_large"


class RateLimitError(ArkorError):
    http_status = 429
    code = "rate_limited"


class TrainingError(ArkorError):
    code = "training_failed"


class InternalError(ArkorError):
    pass


class ServiceUnavailableError(ArkorError):
    http_status = 503
    code = "unavailable"


class StorageError(ServiceUnavailableError):
    code = "storage_error"


class ObjectNotFoundError(StorageError):
    code = "object_not_found"


class ObjectExistsError(StorageError):
    code = "object_exists"


def last_line(text: str) -> str:
    """The last line of a message, at most 300 characters; Ray's may quote a traceback or a whole log before the cause."""
    return (text.strip().splitlines() or [""])[-1][:300]


def from_wire(status: int, body: Any, *, fallback: str = "") -> ArkorError:
    """The exception for an HTTP answer of `status` whose JSON body is `body` (anything, also not an envelope).

    The class is chosen by `code`, else by status, so that a server newer than this client still maps to the nearest class.
    """
    code = message = None
    fields: dict[str, Any] = {}
    if isinstance(body, dict):
        error = body.get("error")
        if isinstance(error, dict):  # OpenAI's envelope, spoken by the public endpoints
            code, message = error.get("code") or error.get("type"), error.get("message")
            fields = {"param": error["param"]} if error.get("param") else {}
        else:
            code, message = body.get("code"), error
            fields = {k: v for k, v in body.items() if k not in ("error", "code", "message", "status")}
    message = str(message or fallback or f"HTTP {status}")
    if isinstance(code, str) and message.startswith(f"{code}: "):
        message = message[len(code) + 2 :]
    cls = _by_code().get(code or "") or _by_status().get(status) or (InternalError if status >= 500 else ArkorError)
    return cls(message, code=code if isinstance(code, str) else None, status=status, **fields)


def _classes(root: type[ArkorError] = ArkorError) -> list[type[ArkorError]]:
    return [root, *(c for sub in root.__subclasses__() for c in _classes(sub))]


def _by_code() -> dict[str, type[ArkorError]]:
    return {c.code: c for c in reversed(_classes()) if c is not ArkorError}


def _by_status() -> dict[int, type[ArkorError]]:
    # Parents come before their children in _classes(), so reversing lets the most general class of a status win.
    return {c.http_status: c for c in reversed(_classes()) if c is not ArkorError and not issubclass(c, TrainingError)}
