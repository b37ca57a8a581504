"""What the arkor SDK and Studio do on the wire, in Python: their rules, their tolerance, and what they would choke on.

Written from the contract, not from arkor-ray's own client, so that the two can disagree.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import httpx

VERSION = "arkor/0.0.3-alpha.1"
STATUSES = ("queued", "running", "completed", "failed", "cancelled")
PERMANENT = (401, 403, 410, 426)
LOGGED = ("step", "loss", "evalLoss", "learningRate", "epoch", "samplesPerSecond")


class CloudApiError(Exception):
    """An answer with an error status: the message that the user sees, and the status."""

    def __init__(self, answer: httpx.Response) -> None:
        try:
            error = answer.json().get("error")
        except (ValueError, AttributeError):
            error = None
        sentence = error if isinstance(error, str) and error else answer.text or f"cloud-api {answer.status_code}"
        super().__init__(sentence)
        self.status = answer.status_code


class SchemaError(Exception):
    """A successful answer that the SDK's schemas reject."""


@dataclass
class CloudApiClient:
    """One call of the SDK's RPC client per method; each checks what the SDK's schema checks."""

    base_url: str
    token: str = ""
    org_slug: str = ""
    project_slug: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.base_url.rstrip("/"), timeout=300)

    def request_anonymous_token(self) -> dict[str, Any]:
        made = self._send("POST", "/v1/auth/anonymous", {"kind": "cli"}, anonymous=True)
        _require(made, token=str, anonymousId=str, kind=str, personalOrg=dict)
        _require(made["personalOrg"], id=str, slug=str, name=str)
        self.token, self.org_slug = made["token"], made["personalOrg"]["slug"]
        return made

    def ensure_project(self, directory: str) -> dict[str, Any]:
        """Creates the project of a working directory; on 409 takes the one of that slug out of the list."""
        slug = "".join(c if c.isascii() and (c.isalnum() or c == "-") else "-" for c in directory.lower())
        slug = slug.strip("-")[:40] or "project"
        try:
            project = self._send("POST", "/v1/projects", {"name": directory, "slug": slug})["project"]
        except CloudApiError as error:
            if error.status != 409:
                raise
            listed = self._send("GET", "/v1/projects")
            _require(listed["org"], slug=str)
            project = next(each for each in listed["projects"] if each["slug"] == slug)
        _require(project, id=str, slug=str, name=str, orgId=str)
        self.project_slug = slug
        return project

    def create_job(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        return _job(self._send("POST", "/v1/jobs", {"name": name, "config": config})["job"])

    def cancel_job(self, job_id: str) -> None:
        self._send("POST", f"/v1/jobs/{job_id}/cancel")

    def list_jobs(self) -> list[dict[str, Any]]:
        return self._send("GET", "/v1/jobs")["jobs"]

    def chat(self, body: dict[str, Any]) -> httpx.Response:
        """The raw answer, not yet read, as the SDK hands it to its user."""
        request = self._request("POST", "/v1/inference/chat", body)
        answer = self.http.send(request, stream=True)
        if answer.status_code >= 400:
            answer.read()
            raise CloudApiError(answer)
        return answer

    def open_events(self, job_id: str, last_event_id: str) -> httpx.Response:
        request = self._request("GET", f"/v1/jobs/{job_id}/events/stream")
        request.headers["Accept"] = "text/event-stream"
        if last_event_id:
            request.headers["Last-Event-ID"] = last_event_id
        answer = self.http.send(request, stream=True)
        if answer.status_code >= 400:
            answer.read()
            raise CloudApiError(answer)
        return answer

    def _request(self, method: str, path: str, body: Any = None, *, anonymous: bool = False) -> httpx.Request:
        self.requests.append((method, path))
        headers = {"X-Arkor-Client": VERSION} | ({} if anonymous else {"Authorization": f"Bearer {self.token}"})
        params = {} if anonymous else {"orgSlug": self.org_slug}
        if not anonymous and self.project_slug and not path.startswith("/v1/projects"):
            params["projectSlug"] = self.project_slug
        options = {} if body is None else {"json": body}
        return self.http.build_request(method, path, params=params, headers=headers, **options)

    def _send(self, method: str, path: str, body: Any = None, *, anonymous: bool = False) -> Any:
        answer = self.http.send(self._request(method, path, body, anonymous=anonymous))
        if answer.status_code >= 400:
            raise CloudApiError(answer)
        return answer.json()


@dataclass
class Checkpoint:
    """What `onCheckpoint` receives."""

    step: int
    job: dict[str, Any]
    _client: CloudApiClient

    def infer(self, messages: list[dict[str, Any]], *, stream: bool = True, **options: Any) -> httpx.Response:
        adapter = {"kind": "checkpoint", "jobId": self.job["id"], "step": self.step}
        return self._client.chat({"messages": messages, "adapter": adapter, "stream": stream, **options})


@dataclass
class Trainer:
    """`createTrainer(...)`: starts the job, then `wait` calls back while it reads the stream.

    `cut_after` lets the connection break after so many frames, each time: the SDK then comes back with the last id.
    """

    client: CloudApiClient
    name: str
    config: dict[str, Any]
    callbacks: dict[str, Callable[[Any], None]] = field(default_factory=dict)
    cut_after: int | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    artifacts: list[Any] = field(default_factory=list)

    def start(self) -> dict[str, Any]:
        self.job = self.client.create_job(self.name, self.config)
        return self.job

    def wait(self) -> dict[str, Any]:
        """The job as the stream left it: the SDK does not fetch it again."""
        last_event_id, failures = "", 0
        while True:
            self.connections += 1
            active = False
            try:
                with closing(self.client.open_events(self.job["id"], last_event_id)) as answer:
                    for count, frame in enumerate(sse(answer.iter_lines()), start=1):
                        if frame["event"] == "end":
                            return self.job
                        if frame["event"] != "ping":
                            active = self._dispatch(frame) or active
                            last_event_id = frame["id"] or last_event_id
                            if self.job["status"] in STATUSES[2:]:
                                return self.job
                        if self.cut_after is not None and count >= self.cut_after:
                            break
            except CloudApiError as error:
                if error.status in PERMANENT:
                    raise
            except httpx.TransportError:
                pass
            failures = 0 if active else failures + 1
            time.sleep(0.05 * 2 ** min(failures, 6))  # the SDK waits for a second and more

    def _dispatch(self, frame: dict[str, str]) -> bool:
        """By `data.type`, whatever `event` says. False for what is no JSON object with a type, and is skipped."""
        try:
            data = json.loads(frame["data"], parse_constant=_not_json)
        except ValueError:
            return False
        if not isinstance(data, dict) or not isinstance(data.get("type"), str):
            return False
        self.seen.append(data)
        kind = data["type"]
        if kind == "training.started":
            self.job |= {"status": "running", "startedAt": data["timestamp"]}
        elif kind == "training.log":
            _require(data, step=int)
            data = {name: data.get(name) for name in LOGGED}
        elif kind == "checkpoint.saved":
            _require(data, step=int)
        elif kind == "training.completed":
            self.job |= {"status": "completed", "completedAt": data["timestamp"]}
            self.artifacts = data.get("artifacts") or []
        elif kind == "training.failed":
            _require(data, error=str)
            self.job |= {"status": "failed", "error": data["error"]}
        if callback := self.callbacks.get(kind):
            callback(Checkpoint(data["step"], self.job, self.client) if kind == "checkpoint.saved" else data)
        return True


def sse(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Frames as the SDK's parser dispatches them: one without data is dropped, one cut off by the end is lost."""
    frame: dict[str, str] = {"id": "", "event": ""}
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield {**frame, "data": "\n".join(data)}
            frame, data = {"id": "", "event": ""}, []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name in frame:
            frame[name] = value


def studio_pieces(lines: Iterator[str]) -> Iterator[str]:
    """What Studio's Playground shows of a streamed answer: contract section 8.3, rules 1 to 5."""
    for frame in sse(lines):
        if frame["event"] == "ping":
            continue
        if frame["event"] == "end" or frame["data"] == "[DONE]":
            return
        try:
            value = json.loads(frame["data"])
        except ValueError:
            yield frame["data"]
            continue
        if isinstance(value, str):
            yield value
            continue
        if not isinstance(value, dict):
            continue
        choice = (value.get("choices") or [{}])[0]
        candidates = ((choice.get("delta") or {}).get("content"), value.get("content"), value.get("text"))
        yield from [text for text in candidates if isinstance(text, str)][:1]


def _job(job: dict[str, Any]) -> dict[str, Any]:
    _require(job, id=str, orgId=str, projectId=str, name=str, status=str, config=dict, createdAt=str)
    _require(job["config"], model=str)
    if job["status"] not in STATUSES:
        raise SchemaError(f"status {job['status']!r}")
    return job


def _require(value: Any, **types: type) -> None:
    for name, kind in types.items():
        if not isinstance(value, dict) or not isinstance(value.get(name), kind):
            raise SchemaError(f"{name} is no {kind.__name__} in {json.dumps(value)[:300]}")


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
