"""The wire as plain HTTP: callers, requests as bytes on a socket, and the frames of a stream. Nothing of our client."""

from __future__ import annotations

import json
import re
import socket
import time
import uuid
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

MODEL = "unsloth/gemma-4-E4B-it"
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"
TIMEOUT_S = 120.0

_FRAME = re.compile(
    rb"(?:id: (?P<id>[0-9]+)\n)?(?:event: (?P<event>[a-z_.]+)\n)?data: (?P<data>[^\r\n]+)\n\n|: ping\n\n"
)


@dataclass
class Caller:
    """An identity with a project. Every call carries its token and its scope."""

    http: httpx.Client
    token: str
    org_slug: str
    org_id: str
    project_slug: str = ""
    project_id: str = ""

    @classmethod
    def login(cls, url: str, slug: str = "contract") -> Caller:
        """A new anonymous identity, with a project of its own."""
        http = httpx.Client(base_url=url, timeout=TIMEOUT_S)
        made = http.post("/v1/auth/anonymous", json={"kind": "cli"}).json()
        caller = cls(http, made["token"], made["personalOrg"]["slug"], made["personalOrg"]["id"])
        answer = caller.post("/v1/projects", {"name": slug, "slug": slug})
        assert answer.status_code == 201, answer.text
        caller.project_slug, caller.project_id = slug, answer.json()["project"]["id"]
        return caller

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def scope(self) -> dict[str, str]:
        return {"orgSlug": self.org_slug, **({"projectSlug": self.project_slug} if self.project_slug else {})}

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.http.request(method, path, **self._with_scope(options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.call("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.call("POST", path, **({} if body is None else {"json": body}), **options)

    def patch(self, path: str, body: Any) -> httpx.Response:
        return self.call("PATCH", path, json=body)

    def delete(self, path: str) -> httpx.Response:
        return self.call("DELETE", path)

    def stream(self, method: str, path: str, **options: Any) -> Any:
        """A request whose answer is read while it comes, as a context manager."""
        return self.http.stream(method, path, **self._with_scope(options))

    def events(self, job_id: str, last_event_id: str | None = None) -> bytes:
        """The body of a job's event stream, read to its end."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
        answer = self.get(f"/v1/jobs/{job_id}/events/stream", headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.content

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        """A greedy answer to one message, whole unless `stream` says otherwise."""
        body = {"messages": [{"role": "user", "content": text}], "stream": False, "temperature": 0, "maxTokens": 32}
        return self.post("/v1/inference/chat", {**body, **fields})

    def create_endpoint(self, target: dict[str, Any], slug: str | None = None, **fields: Any) -> dict[str, Any]:
        """A new endpoint that is open to all, unless told otherwise."""
        body = {"slug": slug or new_slug(), "target": target, "authMode": "none", **fields}
        answer = self.post("/v1/endpoints", body)
        assert answer.status_code == 201, answer.text
        return answer.json()["deployment"]

    def _with_scope(self, options: dict[str, Any]) -> dict[str, Any]:
        options["headers"] = {**self.auth, **options.get("headers", {})}
        options["params"] = {**self.scope, **options.get("params", {})}
        return options


@dataclass
class RawAnswer:
    """An HTTP answer as the socket gave it; the body with its chunks put together."""

    status_line: str
    headers: dict[str, str]
    body: bytes
    rest: bytes = field(repr=False, default=b"")  # of a connection that was kept alive

    @property
    def status(self) -> int:
        return int(self.status_line.split()[1])


def exchange(url: str, *requests: bytes) -> list[RawAnswer]:
    """The answers to requests sent as they are, one after the other on one connection."""
    parts = urlsplit(url)
    answers, left = [], b""
    with socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S) as connection:
        for request in requests:
            connection.sendall(request)
            answers.append(_read_answer(connection, left))
            left = answers[-1].rest
    return answers


def request_bytes(method: str, target: str, *headers: str, body: bytes = b"", host: str = "arkor.localhost") -> bytes:
    """A request with these headers and no others but Host."""
    return "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode() + body


@dataclass(frozen=True)
class Frame:
    """One frame of a stream. A comment has no data."""

    id: int | None
    event: str | None
    data: bytes | None

    @property
    def json(self) -> Any:
        assert self.data is not None
        return json.loads(self.data, parse_constant=_no_constant)


def frames(body: bytes) -> list[Frame]:
    """The stream's frames; fails on any byte that is not part of a whole frame in the contract's form."""
    found, position = [], 0
    while position < len(body):
        match = _FRAME.match(body, position)
        assert match, f"no frame at byte {position}: {body[position : position + 200]!r}"
        number = int(match["id"]) if match["id"] else None
        found.append(Frame(number, match["event"].decode() if match["event"] else None, match["data"]))
        position = match.end()
    return found


def chunks(body: bytes) -> list[dict[str, Any]]:
    """The OpenAI chunks of a streamed answer; fails unless it is bare data frames that end in [DONE]."""
    *found, done = [frame for frame in frames(body) if frame.data is not None]
    assert done.data == b"[DONE]", body[-300:]
    assert all(frame.id is None and frame.event is None for frame in (*found, done))
    return [frame.json for frame in found]


def text_of(body: bytes) -> str:
    """The text of a streamed answer."""
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks(body) if c["choices"])


def assert_error(answer: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """Checks the contract's envelope; returns it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert isinstance(body["error"], str) and body["error"].startswith(f"{body['code']}: "), body
    assert "detail" not in body
    assert code is None or body["code"] == code, body
    return body


def new_slug() -> str:
    return f"e-{uuid.uuid4().hex[:12]}"


def _no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def _read_answer(connection: socket.socket, data: bytes) -> RawAnswer:
    deadline = time.monotonic() + TIMEOUT_S

    def more() -> None:
        nonlocal data
        assert time.monotonic() < deadline, f"the answer has no end: {data[-300:]!r}"
        chunk = connection.recv(65536)
        assert chunk, f"the connection ended within an answer: {data[-300:]!r}"
        data += chunk

    while b"\r\n\r\n" not in data:
        more()
    head, _, data = data.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if "transfer-encoding" not in headers:
        length = int(headers.get("content-length", 0))
        while len(data) < length:
            more()
        return RawAnswer(status_line, headers, data[:length], data[length:])
    body = b""
    while True:
        while b"\r\n" not in data:
            more()
        size, _, rest = data.partition(b"\r\n")
        end = int(size, 16) + 2
        while len(rest) < end:
            more()
            rest = data.partition(b"\r\n")[2]
        body, data = body + rest[: end - 2], rest[end:]
        if end == 2:
            return RawAnswer(status_line, headers, body, data)
