"""Every HTTP call of the API as a value: what to send and how to read the answer. No I/O.

Both clients send the same calls; `session.py` adds the token and the scope.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel

from arkor_ray.errors import ArkorError, InternalError, InvalidRequestError, ServiceUnavailableError, from_wire
from arkor_ray.schemas.checkpoint import Checkpoint, CheckpointManifest
from arkor_ray.schemas.endpoint import Endpoint, EndpointKey, IssuedEndpointKey
from arkor_ray.schemas.event import Event
from arkor_ray.schemas.identity import AnonymousToken, IssuedToken, Me, Token
from arkor_ray.schemas.job import Job
from arkor_ray.schemas.project import Project
from arkor_ray.schemas.run import Run

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

FINAL = "final"
#: Names one adapter of a job: the step of a checkpoint, or "final".
AdapterRef = int | str

#: A cold base model may take minutes to answer; the contract's clients wait 300 s for the first byte.
PATIENT = httpx.Timeout(30.0, read=310.0)
#: The server sends some byte every 15 s, so a stream silent for this long is a dead connection.
STREAM = httpx.Timeout(30.0, read=60.0)

#: A job may print nothing for as long as it likes.
SILENT = httpx.Timeout(30.0, read=None)


class Scope(Enum):
    """Which part of `?orgSlug=…&projectSlug=…` a route asks for."""

    NONE = 0
    ORG = 1
    PROJECT = 2


class Repeat(Enum):
    """Whether a call that failed may be sent again (`retry.py`)."""

    ALWAYS = "always"  # twice is as good as once
    UNSENT = "unsent"  # only where the connection could not be opened: it makes something, or changes it
    NEVER = "never"  # the caller does so itself, or asked about this very moment


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request. `read` makes the result out of a successful response whose body is there."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    body: dict[str, Any] | None = None
    params: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    scope: Scope = Scope.PROJECT
    auth: bool = True
    timeout: httpx.Timeout | None = None
    may_repeat: Repeat | None = None  # None: as its method says

    @property
    def repeat(self) -> Repeat:
        by_method = Repeat.ALWAYS if self.method in ("GET", "PUT", "DELETE") else Repeat.UNSENT
        return self.may_repeat or by_method


#: Several calls, of which each may depend on the answers before it. A driver sends what it yields and sends back the
#: result, or throws the error in.
Flow = Generator[Call[Any], Any, T]


@dataclass(frozen=True)
class JobDetail:
    """A job with the events it has so far."""

    job: Job
    events: list[Event]


@dataclass(frozen=True)
class AdapterDetail:
    """One adapter of a job, and the manifest that names its files."""

    checkpoint: Checkpoint
    manifest: CheckpointManifest


def anonymous_token() -> Call[AnonymousToken]:
    return Call("POST", "/v1/auth/anonymous", _model(AnonymousToken), {"kind": "cli"}, scope=Scope.NONE, auth=False)


def cli_config() -> Call[dict[str, Any]]:
    return Call("GET", "/v1/auth/cli/config", _object, scope=Scope.NONE, auth=False)


def me() -> Call[Me]:
    return Call("GET", "/v1/me", _model(Me), scope=Scope.NONE)


def list_tokens() -> Call[list[Token]]:
    return Call("GET", "/v1/tokens", _models(Token, "tokens"), scope=Scope.ORG)


def create_token(label: str, email: str | None, expires_in_days: int | None) -> Call[IssuedToken]:
    body = _without_none({"label": label, "email": email, "expiresInDays": expires_in_days})
    return Call("POST", "/v1/tokens", _model(IssuedToken), body, scope=Scope.ORG)


def revoke_token(token_id: str) -> Call[None]:
    return Call("DELETE", f"/v1/tokens/{_part(token_id)}", _nothing, scope=Scope.ORG)


def list_projects() -> Call[list[Project]]:
    return Call("GET", "/v1/projects", _models(Project, "projects"), scope=Scope.ORG)


def create_project(name: str, slug: str) -> Call[Project]:
    return Call("POST", "/v1/projects", _model(Project, "project"), {"name": name, "slug": slug}, scope=Scope.ORG)


def create_job(name: str, config: dict[str, Any]) -> Call[Job]:
    return Call("POST", "/v1/jobs", _model(Job, "job"), {"name": name, "config": config})


def list_jobs() -> Call[list[Job]]:
    return Call("GET", "/v1/jobs", _models(Job, "jobs"))


def get_job(job_id: str) -> Call[JobDetail]:
    def read(response: httpx.Response) -> JobDetail:
        # The list holds the stream's data objects in order, and a job's events are numbered from 1 without holes.
        events = _object(response).get("events") or []
        listed = [Event(id=n, type=str(data.get("type")), data=data) for n, data in enumerate(events, start=1)]
        return JobDetail(_model(Job, "job")(response), listed)

    return Call("GET", _job_path(job_id), read)


def cancel_job(job_id: str) -> Call[None]:
    return Call("POST", f"{_job_path(job_id)}/cancel", _nothing)


def job_logs(job_id: str, attempt: int | None, *, follow: bool = False) -> Call[str]:
    """With `follow`, the caller reads the body."""
    params = {"attempt": str(attempt)} if attempt is not None else {}
    if follow:
        params["follow"] = "true"
    timeout = SILENT if follow else None
    return Call("GET", f"{_job_path(job_id)}/logs", lambda response: response.text, params=params, timeout=timeout)


def job_events(job_id: str, headers: dict[str, str]) -> Call[None]:
    """The event stream; the caller reads the body."""
    path = f"{_job_path(job_id)}/events/stream"
    return Call("GET", path, _nothing, headers=headers, timeout=STREAM, may_repeat=Repeat.NEVER)


def list_checkpoints(job_id: str) -> Call[list[Checkpoint]]:
    return Call("GET", f"{_job_path(job_id)}/checkpoints", _models(Checkpoint, "checkpoints"))


def get_checkpoint(job_id: str, ref: AdapterRef) -> Call[AdapterDetail]:
    def read(response: httpx.Response) -> AdapterDetail:
        return AdapterDetail(
            _model(Checkpoint, "checkpoint")(response), _model(CheckpointManifest, "manifest")(response)
        )

    return Call("GET", f"{_job_path(job_id)}/checkpoints/{_ref(ref)}", read)


def checkpoint_file(job_id: str, ref: AdapterRef, path: str) -> Call[None]:
    """One file of an adapter; the caller reads the body."""
    quoted = "/".join(_part(part) for part in path.split("/"))
    return Call("GET", f"{_job_path(job_id)}/checkpoints/{_ref(ref)}/files/{quoted}", _nothing, timeout=PATIENT)


def chat(
    messages: list[dict[str, Any]],
    *,
    adapter: dict[str, Any] | None = None,
    base_model: str | None = None,
    stream: bool = True,
    **fields: Any,
) -> Call[None]:
    """Inference; the caller reads the body. `fields` are the wire's further fields, in snake_case or camelCase."""
    given = {_camel(name): value for name, value in fields.items()}
    body = {"messages": messages, "adapter": adapter, "baseModel": base_model, "stream": stream, **given}
    path, body = "/v1/inference/chat", _without_none(body)
    return Call("POST", path, _nothing, body, timeout=PATIENT, may_repeat=Repeat.ALWAYS)  # it leaves nothing behind


def adapter_of(job_id: str, ref: AdapterRef) -> dict[str, Any]:
    """The wire's `adapter` object for a job's checkpoint at a step, or for its final adapter."""
    if isinstance(ref, int):
        return {"kind": "checkpoint", "jobId": job_id, "step": ref}
    if ref != FINAL:
        raise InvalidRequestError(f"step: must be a number, or 'final' (got {ref!r})", param="step")
    return {"kind": FINAL, "jobId": job_id}


def list_endpoints() -> Call[list[Endpoint]]:
    return Call("GET", "/v1/endpoints", _models(Endpoint, "deployments"))


def create_endpoint(slug: str, target: dict[str, Any] | None, **fields: Any) -> Call[Endpoint]:
    """Publish `target`, of `target_of`. `fields` are the wire's further fields, in snake_case."""
    if target is None:
        raise InvalidRequestError("job_id, base_model: give one of the two, to be served", param="target")
    body = _endpoint_body(slug=slug, target=target, **fields)
    return Call("POST", "/v1/endpoints", _model(Endpoint, "deployment"), body, timeout=PATIENT)


def get_endpoint(endpoint_id: str) -> Call[Endpoint]:
    return Call("GET", _endpoint_path(endpoint_id), _model(Endpoint, "deployment"))


def update_endpoint(endpoint_id: str, target: dict[str, Any] | None, **fields: Any) -> Call[Endpoint]:
    """Change what is not None."""
    body = _endpoint_body(target=target, **fields)
    return Call("PATCH", _endpoint_path(endpoint_id), _model(Endpoint, "deployment"), body, timeout=PATIENT)


def delete_endpoint(endpoint_id: str) -> Call[None]:
    return Call("DELETE", _endpoint_path(endpoint_id), _nothing)


def list_endpoint_keys(endpoint_id: str) -> Call[list[EndpointKey]]:
    return Call("GET", f"{_endpoint_path(endpoint_id)}/keys", _models(EndpointKey, "keys"))


def create_endpoint_key(endpoint_id: str, label: str) -> Call[IssuedEndpointKey]:
    return Call("POST", f"{_endpoint_path(endpoint_id)}/keys", _model(IssuedEndpointKey, "key"), {"label": label})


def revoke_endpoint_key(endpoint_id: str, key_id: str) -> Call[None]:
    return Call("DELETE", f"{_endpoint_path(endpoint_id)}/keys/{_part(key_id)}", _nothing)


def list_runs(endpoint_id: str, limit: int, before: str | None) -> Call[list[Run]]:
    params = _without_none({"limit": str(limit), "before": before})
    return Call("GET", f"{_endpoint_path(endpoint_id)}/runs", _models(Run, "runs"), params=params)


def export_runs(endpoint_id: str) -> Call[None]:
    """All runs as JSONL; the caller reads the body."""
    return Call("GET", f"{_endpoint_path(endpoint_id)}/runs/export", _nothing, timeout=PATIENT)


def target_of(job_id: str | None, step: AdapterRef, base_model: str | None) -> dict[str, Any] | None:
    """The wire's `target` object, an adapter of a job or a base model; None when neither is named."""
    if job_id is not None and base_model is not None:
        raise InvalidRequestError("job_id, base_model: name two targets; give one of them", param="target")
    if job_id is not None:
        return {"kind": "adapter", "adapter": adapter_of(job_id, step)}
    return None if base_model is None else {"kind": "base_model", "baseModel": base_model}


def list_models() -> Call[list[dict[str, Any]]]:
    def read(response: httpx.Response) -> list[dict[str, Any]]:
        body = _object(response)
        return body["models"] if "models" in body else body.get("data", [])

    return Call("GET", "/v1/models", read, scope=Scope.NONE)


def health(path: str) -> Call[dict[str, Any]]:
    """`/healthz` or `/readyz`. A 503 of the latter is raised like any other error."""
    return Call("GET", path, _object, scope=Scope.NONE, auth=False, may_repeat=Repeat.NEVER)


def error_of(response: httpx.Response) -> ArkorError:
    """The exception that an unsuccessful response, read to its end, stands for."""
    try:
        body = response.json()
    except ValueError:
        body = None
    envelope = body if isinstance(body, dict) else {}
    checks = envelope.get("checks")
    if response.status_code >= 500 and not envelope.get("error") and not isinstance(checks, dict):
        request = response.request
        done = "; it may have been done all the same" if request.method in ("PATCH", "POST") else ""
        return ServiceUnavailableError(
            f"{request.method} {request.url.path} was answered {response.status_code} without saying why, by something "
            f"between here and the service (a proxy, a load balancer) that lost it on the way{done}; try again",
            status=response.status_code,
            retry_after=_retry_after(response),
        )
    fallback = response.text[:500].strip() or f"HTTP {response.status_code}"
    if isinstance(checks, dict):  # what `/readyz` says while it is not ready
        fallback = "Not ready: " + ", ".join(f"{part}: {state}" for part, state in checks.items())
    error = from_wire(response.status_code, body, fallback=fallback)
    if error.retry_after is None and (seconds := _retry_after(response)) is not None:
        error.fields["retry_after"] = seconds
    return error


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds; None where the header is not there or names a date, which no service of ours does."""
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if value.isascii() and value.isdecimal() else None


def _job_path(job_id: str) -> str:
    return f"/v1/jobs/{_part(job_id)}"


def _endpoint_path(endpoint_id: str) -> str:
    return f"/v1/endpoints/{_part(endpoint_id)}"


def _endpoint_body(**fields: Any) -> dict[str, Any]:
    return _without_none({_camel(name): value for name, value in fields.items()})


def _part(value: str) -> str:
    if value in ("", ".", ".."):
        raise InvalidRequestError(f"{value!r} is not an id", param="id")
    return quote(value, safe="")


def _ref(ref: AdapterRef) -> str:
    return str(adapter_of("", ref).get("step", FINAL))


def _camel(name: str) -> str:
    return to_camel(name) if "_" in name else name


def _without_none(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _nothing(response: httpx.Response) -> None:
    return None


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise _unexpected(response, "it is not a JSON object")
    return body


def _model(cls: type[M], key: str | None = None) -> Callable[[httpx.Response], M]:
    def read(response: httpx.Response) -> M:
        body = _object(response)
        return _validate(cls, body if key is None else body.get(key), response)

    return read


def _models(cls: type[M], key: str) -> Callable[[httpx.Response], list[M]]:
    def read(response: httpx.Response) -> list[M]:
        entries = _object(response).get(key)
        if not isinstance(entries, list):
            raise _unexpected(response, f"`{key}` is not a list")
        return [_validate(cls, entry, response) for entry in entries]

    return read


def _validate(cls: type[M], value: Any, response: httpx.Response) -> M:
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or cls.__name__
        raise _unexpected(response, f"{where}: {first['msg']}") from error


def _unexpected(response: httpx.Response, what: str) -> InternalError:
    request = response.request
    return InternalError(
        f"The answer to {request.method} {request.url.path} is not what this client expects ({what}); "
        "is the URL that of an arkor-ray service?",
        code="unexpected_response",
    )
