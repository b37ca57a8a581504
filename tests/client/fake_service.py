"""An arkor-ray service in this process, without a socket: the routes a client calls, and verbs for what may happen to it.

It is an httpx transport for both clients. Events wait in a job until a stream asks for them; a live stream polls.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import httpx

from arkor_ray.schemas.checkpoint import CheckpointManifest, ManifestFile

URL = "http://fake.test"
TERMINAL = {"training.completed": "completed", "training.failed": "failed", "training.cancelled": "cancelled"}
POLL = 0.002


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class FakeJob:
    wire: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)
    adapters: dict[str, dict[str, bytes]] = field(default_factory=dict)
    ended: bool = False

    @property
    def id(self) -> str:
        return self.wire["id"]


class FakeService(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """State, verbs and routes. `requests` is everything that was asked, in order."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.tokens: dict[str, str] = {}  # token -> org slug
        self.projects: dict[str, list[dict[str, Any]]] = {}
        self.jobs: dict[str, FakeJob] = {}
        self.issued: list[dict[str, Any]] = []
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.endpoint_keys: dict[str, list[dict[str, Any]]] = {}
        self.runs: list[dict[str, Any]] = []
        self.export_breaks = False
        self.answer: Callable[[dict[str, Any]], str] = lambda body: "fine"
        self.stream_pieces = 2
        self._script: list[Callable[[FakeJob], None]] = []
        self._drops: list[int] = []
        self._refusals: list[tuple[str, int, dict[str, Any]]] = []
        self._unreachable: list[str] = []

    # Verbs

    def on_create(self, *steps: Callable[[FakeJob], None]) -> None:
        """What happens to every job right after its creation."""
        self._script.extend(steps)

    def emit(self, job: FakeJob, type: str, **fields: Any) -> None:
        data = {"type": type, "jobId": job.id, "timestamp": now(), **fields}
        job.events.append(data)
        if type == "training.started":
            job.wire |= {"status": "running", "startedAt": data["timestamp"]}
        if type in TERMINAL:
            job.wire |= {"status": TERMINAL[type], "completedAt": data["timestamp"], "error": fields.get("error")}
            job.ended = True

    def answer_at_endpoint(self, asked: str, **answer: Any) -> dict[str, Any]:
        """A run that is stored."""
        run = {
            "id": f"r{len(self.runs) + 1}", "endpointId": "e1", "keyId": None, "model": "tiny", "createdAt": now(),
            "messages": [{"role": "user", "content": asked}], "tools": None,
            "answer": {"role": "assistant", "content": "fine", **answer}, "finishReason": "stop",
            "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}, "latencyMs": 20,
            "firstTokenMs": 10, "systemFingerprint": "fp",
        }  # fmt: skip
        self.runs.append(run)
        return run

    def emit_started(self, job: FakeJob) -> None:
        self.emit(job, "training.started", metadata={"total_steps": 4})

    def emit_log(self, job: FakeJob, step: int, **numbers: float | None) -> None:
        self.emit(job, "training.log", step=step, **{"loss": 2.0 / step, **numbers})

    def emit_checkpoint(self, job: FakeJob, step: int, **fields: Any) -> None:
        job.adapters[str(step)] = {"adapter_model.safetensors": f"weights {step}".encode(), "tokenizer.json": b"{}"}
        self.emit(job, "checkpoint.saved", step=step, artifacts=[{"pathname": "adapter_model.safetensors"}], **fields)

    def complete(self, job: FakeJob) -> None:
        job.adapters["final"] = {"adapter_model.safetensors": b"final weights", "tokenizer.json": b"{}"}
        metrics = {"finalLoss": 0.5, "totalSteps": 4, "totalTime": 1.5}
        self.emit(job, "training.completed", artifacts=[{"pathname": "adapter_model.safetensors"}], metrics=metrics)

    def fail(self, job: FakeJob, error: str = "the loss is not finite") -> None:
        self.emit(job, "training.failed", error=error, step=3)

    def end_stream(self, job: FakeJob) -> None:
        """`end` without a terminal event."""
        job.ended = True

    def drop_connection(self, *, after_event: int) -> None:
        """The next stream breaks once it has carried this event."""
        self._drops.append(after_event)

    def refuse(self, route: str, status: int, /, *, times: int = 1, **body: Any) -> None:
        """Answer the next requests of a path that ends so with an error."""
        self._refusals += [(route, status, {"error": f"refused with {status}", **body})] * times

    def be_unreachable(self, route: str, *, times: int = 1) -> None:
        self._unreachable += [route] * times

    def asked(self, method: str, end: str) -> list[httpx.Request]:
        return [r for r in self.requests if r.method == method and r.url.path.endswith(end)]

    # Transport

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        if request.method == "POST":
            time.sleep(POLL)  # so that calls made together do meet here
        return self._answer(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        if request.method == "POST":
            await asyncio.sleep(POLL)
        return self._answer(request)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        path = request.url.path
        for route in self._unreachable:
            if path.endswith(route):
                self._unreachable.remove(route)
                raise httpx.ConnectError("connection refused", request=request)
        for refusal in self._refusals:
            if path.endswith(refusal[0]):
                self._refusals.remove(refusal)
                return httpx.Response(refusal[1], json=refusal[2])
        body = json.loads(request.content) if request.content else {}
        parts = path.strip("/").split("/")
        if parts[0] in ("healthz", "readyz"):
            return httpx.Response(200, json={"status": "ok"})
        if parts[1:2] == ["auth"]:
            return self._auth(parts)
        org = self.tokens.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        if org is None:
            return error(401, "unauthorized", "unknown token")
        if parts[1] in ("me", "models"):
            return self._me(org) if parts[1] == "me" else httpx.Response(200, json={"models": [{"name": "tiny"}]})
        if request.url.params.get("orgSlug") != org:
            return error(403, "forbidden", "not a member")
        if parts[1] in ("projects", "tokens"):
            return getattr(self, f"_{parts[1]}")(request.method, org, body, parts)
        if request.url.params.get("projectSlug") not in [p["slug"] for p in self.projects.get(org, [])]:
            return error(404, "not_found", "no such project; delete .arkor/state.json")
        if parts[1] == "inference":
            return self._chat(body)
        if parts[1] == "endpoints":
            return self._endpoint_routes(request.method, dict(request.url.params), body, parts[2:])
        return self._job_routes(request, org, body, parts[2:])

    def _auth(self, parts: list[str]) -> httpx.Response:
        if parts[2] == "cli":
            nothing = {"auth0Domain": None, "clientId": None, "audience": None, "callbackPorts": []}
            return httpx.Response(200, json=nothing)
        token = self.add_token()
        org = {"id": str(uuid.uuid4()), "slug": self.tokens[token], "name": "Anonymous"}
        wire = {"token": token, "anonymousId": str(uuid.uuid4()), "kind": "cli", "personalOrg": org}
        return httpx.Response(200, json=wire)

    def add_token(self, org: str | None = None) -> str:
        token = f"token-{len(self.tokens) + 1}"
        self.tokens[token] = org or f"anon-{len(self.tokens) + 1}"
        return token

    def _me(self, org: str) -> httpx.Response:
        user = {"id": "u", "email": None, "kind": "anonymous"}
        return httpx.Response(200, json={"user": user, "orgs": [{"id": "o", "slug": org, "name": org}]})

    def _projects(self, method: str, org: str, body: dict[str, Any], parts: list[str]) -> httpx.Response:
        projects = self.projects.setdefault(org, [])
        if method == "GET":
            return httpx.Response(200, json={"org": {"id": "o", "slug": org, "name": org}, "projects": projects})
        if body["slug"] in [project["slug"] for project in projects]:
            return error(409, "conflict", "Project slug is taken")
        project = {**body, "id": str(uuid.uuid4()), "orgId": "o", "createdAt": now(), "updatedAt": now()}
        projects.append(project)
        return httpx.Response(201, json={"project": project})

    def _tokens(self, method: str, org: str, body: dict[str, Any], parts: list[str]) -> httpx.Response:
        if method == "GET":
            return httpx.Response(200, json={"tokens": self.issued})
        if method == "DELETE":
            self.issued = [token for token in self.issued if token["id"] != parts[2]]
            return httpx.Response(204)
        id = f"t{len(self.issued) + 1}"
        self.issued.append({"id": id, "label": body["label"], "prefix": "ark_", "createdAt": now()})
        token = {"token": self.add_token(org), "id": id, "label": body["label"]}
        owner = {"org": {"id": "o", "slug": org, "name": org}, "user": {"id": "u", "kind": "user"}}
        return httpx.Response(201, json={**token, **owner})

    def _endpoint_routes(
        self, method: str, query: dict[str, str], body: dict[str, Any], parts: list[str]
    ) -> httpx.Response:
        if not parts:
            if method == "GET":
                return httpx.Response(200, json={"deployments": list(reversed(self.endpoints.values()))})
            if body["slug"] in [endpoint["slug"] for endpoint in self.endpoints.values()]:
                return error(409, "conflict", "Deployment slug is already taken")
            made = {
                "id": f"e{len(self.endpoints) + 1}", "orgId": "o", "projectId": "p", "urlFormat": "openai_compat",
                "enabled": True, "customDomain": None, "runRetentionMode": "days", "runRetentionDays": 7,
                "createdAt": now(), "updatedAt": now(), "url": f"{URL}/e/{body['slug']}/v1", **body,
            }  # fmt: skip
            self.endpoints[made["id"]], self.endpoint_keys[made["id"]] = made, []
            return httpx.Response(201, json={"deployment": made})
        endpoint, keys = self.endpoints.get(parts[0]), self.endpoint_keys.get(parts[0], [])
        if endpoint is None:
            return error(404, "not_found", "no such endpoint")
        match method, parts[1:]:
            case "PATCH", []:
                endpoint |= body
                if body.get("runRetentionMode", "days") != "days":
                    del endpoint["runRetentionDays"]
            case "DELETE", []:
                del self.endpoints[parts[0]]
                return httpx.Response(204)
            case "GET", ["runs"]:
                newest = list(reversed(self.runs))
                at = [run["id"] for run in newest].index(query["before"]) + 1 if "before" in query else 0
                return httpx.Response(200, json={"runs": newest[at : at + int(query["limit"])]})
            case "GET", ["runs", "export"]:
                if self.export_breaks:
                    return httpx.Response(200, stream=_BrokenStream())
                rows = [{"messages": [*run["messages"], run["answer"]]} for run in self.runs]
                return httpx.Response(200, content="".join(f"{json.dumps(row)}\n" for row in rows).encode())
            case "GET", ["keys"]:
                return httpx.Response(200, json={"keys": keys})
            case "POST", ["keys"]:
                key = {
                    "id": f"k{len(keys) + 1}",
                    "label": body["label"],
                    "prefix": "ark_live_12345678",
                    "createdAt": now(),
                }
                keys.append({**key, "enabled": True, "lastUsedAt": None})
                return httpx.Response(201, json={"key": {**key, "plaintext": f"ark_live_12345678-{key['id']}"}})
            case "DELETE", ["keys", key_id]:
                next(key for key in keys if key["id"] == key_id)["enabled"] = False
                return httpx.Response(204)
        return httpx.Response(200, json={"deployment": endpoint})

    def _job_routes(self, request: httpx.Request, org: str, body: dict[str, Any], parts: list[str]) -> httpx.Response:
        if not parts:
            if request.method == "GET":
                return httpx.Response(200, json={"jobs": [job.wire for job in reversed(self.jobs.values())]})
            return httpx.Response(201, json={"job": self._create(body).wire})
        job = self.jobs.get(parts[0])
        if job is None:
            return error(404, "not_found", "no such job")
        match parts[1:]:
            case []:
                return httpx.Response(200, json={"job": job.wire, "events": job.events})
            case ["cancel"]:
                if job.wire["status"] in TERMINAL.values():
                    return error(409, "conflict", f"Job is already {job.wire['status']}")
                self.emit(job, "training.cancelled")
                return httpx.Response(200, json={"ok": True})
            case ["logs"]:
                return httpx.Response(200, text="one line\n")
            case ["events", "stream"]:
                after = int(request.headers.get("Last-Event-ID", 0))
                drop = self._drops.pop(0) if self._drops else None
                headers = {"Content-Type": "text/event-stream"}
                return httpx.Response(200, headers=headers, stream=_EventStream(job, after, drop))
            case ["checkpoints"]:
                listed = [checkpoint(job, ref) for ref in job.adapters]
                return httpx.Response(200, json={"checkpoints": listed})
            case ["checkpoints", ref] if ref in job.adapters:
                manifest = manifest_of(job, ref).model_dump(mode="json")
                return httpx.Response(200, json={"checkpoint": checkpoint(job, ref), "manifest": manifest})
            case ["checkpoints", ref, "files", path] if ref in job.adapters:
                return httpx.Response(200, content=job.adapters[ref][path])
        return error(404, "not_found", "no such checkpoint")

    def _create(self, body: dict[str, Any]) -> FakeJob:
        wire = {
            "id": str(uuid.uuid4()), "orgId": "o", "projectId": "p", "name": body["name"], "status": "queued",
            "config": body["config"], "createdAt": now(),
        }  # fmt: skip
        job = self.jobs[wire["id"]] = FakeJob(wire)
        created = dict(wire)
        for step in self._script:
            step(job)
        return FakeJob(created)

    def _chat(self, body: dict[str, Any]) -> httpx.Response:
        text = self.answer(body)
        if not body["stream"]:
            message = {"role": "assistant", "content": text}
            return httpx.Response(200, json={"choices": [{"index": 0, "message": message}], "content": text})
        cut = max(1, len(text) // self.stream_pieces)
        pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
        frames = [f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': p}}]})}\n\n" for p in pieces]
        content = "".join([*frames, "data: [DONE]\n\n"])
        return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=content.encode())


class _BrokenStream(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield b'{"messages": ['
        raise httpx.ReadError("connection reset by peer")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk


class _EventStream(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __init__(self, job: FakeJob, after: int, drop: int | None) -> None:
        self._job, self._sent, self._drop = job, after, drop

    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield from self._ready()
            if self._is_over():
                return
            time.sleep(POLL)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            for chunk in self._ready():
                yield chunk
            if self._is_over():
                return
            await asyncio.sleep(POLL)

    def _ready(self) -> Iterator[bytes]:
        while self._sent < len(self._job.events):
            if self._drop is not None and self._sent >= self._drop:
                raise httpx.ReadError("connection reset by peer")
            data = self._job.events[self._sent]
            self._sent += 1
            yield f"id: {self._sent}\nevent: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()
        if self._drop is not None and self._sent >= self._drop:
            raise httpx.ReadError("connection reset by peer")
        if self._is_over():
            yield b"event: end\ndata: {}\n\n"

    def _is_over(self) -> bool:
        return self._job.ended and self._sent >= len(self._job.events)


def error(status: int, code: str, sentence: str) -> httpx.Response:
    return httpx.Response(status, json={"error": f"{code}: {sentence}", "code": code})


def manifest_of(job: FakeJob, ref: str) -> CheckpointManifest:
    files = [
        ManifestFile(path=path, size_bytes=len(data), sha256=sha256(data).hexdigest())
        for path, data in job.adapters[ref].items()
    ]
    name = f"{job.id}-final" if ref == "final" else f"{job.id}-step-{ref}"
    return CheckpointManifest(
        adapter_id=name, job_id=job.id, step=4 if ref == "final" else int(ref), final=ref == "final", base_model="tiny",
        base_precision="fp32", r=8, lora_alpha=8, target_modules=["q_proj"], files=files,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip


def checkpoint(job: FakeJob, ref: str) -> dict[str, Any]:
    manifest = manifest_of(job, ref)
    return {
        "jobId": job.id, "step": manifest.step, "kind": "final" if manifest.final else "checkpoint",
        "adapterId": manifest.adapter_id, "manifestSha256": manifest.sha256, "ready": True,
        "createdAt": now(), "metrics": {"loss": 0.5}, "artifacts": [],
    }  # fmt: skip
