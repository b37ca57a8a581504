"""The real application in this process, with a database of its own and a gateway that answers as the test says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from arkor_ray.api.app import create_app
from arkor_ray.db import checkpoints
from arkor_ray.db.session import Database
from arkor_ray.errors import ServiceUnavailableError
from arkor_ray.events import publisher
from arkor_ray.events.stream import EventTail
from arkor_ray.schemas import event
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.checkpoint import CheckpointManifest, ManifestFile
from arkor_ray.schemas.job import JobStatus
from arkor_ray.settings import Settings
from arkor_ray.storage import layout, open_store
from tests.api.asgi_stream import AsgiStream
from tests.db.databases import migrated_database

MODEL = "unsloth/gemma-4-E4B-it"
CONFIG: dict[str, Any] = {"model": MODEL, "datasetSource": {"type": "huggingface", "name": "arkorlab/triage-demo"}}
WEIGHTS = b"weights of an adapter"

_numbers = itertools.count(1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, cache_dir=tmp_path, models={MODEL: "base/model", "Tiny": "base/tiny"})


@pytest.fixture
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """SQLite; both databases, one after the other, for tests marked `databases.both`."""
    yield from migrated_database(getattr(request, "param", "sqlite"), request, tmp_path)


class FakeGateway:
    """Inference that answers as it was told. `requests` keeps what was asked; `running` how many are not yet over.

    `prepared` keeps what was to be made ready: ids of adapters, base models as they are loaded.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.prepared: list[str] = []
        self._refusal: Exception | None = None
        self.running = 0
        self.answer("Hello", " there")

    def answer(self, *pieces: str | dict[str, Any], finish_reason: str = "stop", pause_s: float = 0) -> None:
        """With pieces of text, or items as they are; `pause_s` before each text."""
        self._pause_s = pause_s
        usage = {"prompt_tokens": 9, "completion_tokens": len(pieces), "total_tokens": 9 + len(pieces)}
        self._script: list[Any] = [
            {"type": "start", "prompt_tokens": 9, "system_fingerprint": "fp-1"},
            *({"type": "delta", "text": piece} if isinstance(piece, str) else piece for piece in pieces),
            {"type": "end", "finish_reason": finish_reason, "usage": usage},
        ]

    def fail(self, error: Exception) -> None:
        """Before the first item."""
        self._script = [error]

    def fail_after(self, *pieces: str, error: Exception) -> None:
        self.answer(*pieces)
        self._script[-1] = error

    def stop_after(self, *pieces: str) -> None:
        """Ends as if it were finished, without saying so."""
        self.answer(*pieces)
        self._script.pop()

    def hang(self) -> None:
        """Never begins."""
        self._script = [None]

    def hang_after(self, *pieces: str) -> None:
        self.answer(*pieces)
        self._script[-1] = None

    def refuse_to_prepare(self, error: Exception) -> None:
        self._refusal = error

    async def prepare(self, base_model: str, base_precision: str | None, manifest: CheckpointManifest | None) -> None:
        if self._refusal is not None:
            raise self._refusal
        self.prepared.append(manifest.adapter_id if manifest else base_model)

    async def chat(
        self, base_model: str, base_precision: str | None, request: dict[str, Any], adapter_id: str | None
    ) -> AsyncGenerator[dict[str, Any]]:
        self.requests.append(
            {"base_model": base_model, "base_precision": base_precision, "adapter_id": adapter_id, **request}
        )
        self.running += 1
        try:
            for item in self._script:
                if item is None:
                    await asyncio.Event().wait()
                if isinstance(item, Exception):
                    raise item
                if item["type"] == "delta":
                    await asyncio.sleep(self._pause_s)
                yield item
        finally:
            self.running -= 1


class FakeLogs:
    """What drivers printed. A submission may be told to `say` more, to `end`, and be `forgotten`; Ray itself to `go_away`."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[str]] = {}
        self._ended: set[str] = set()
        self._forgotten: set[str] = set()
        self._away = False

    def say(self, submission_id: str, text: str) -> None:
        self._pieces.setdefault(submission_id, []).append(text)

    def end(self, submission_id: str) -> None:
        self._ended.add(submission_id)

    def forget(self, submission_id: str) -> None:
        self._forgotten.add(submission_id)

    def go_away(self, *, away: bool = True) -> None:
        self._away = away

    async def read(self, submission_id: str) -> str | None:
        self._check()
        if submission_id in self._forgotten:
            return None
        return "".join(self._pieces.get(submission_id, [f"output of {submission_id}\n"]))

    async def follow(self, submission_id: str) -> AsyncGenerator[str]:
        shown = 0
        while True:
            self._check()
            if submission_id in self._forgotten or submission_id not in self._pieces:
                raise ServiceUnavailableError(f"{submission_id} does not exist")
            for piece in self._pieces[submission_id][shown:]:
                shown += 1
                yield piece
            if submission_id in self._ended:
                return
            await asyncio.sleep(0.005)

    def _check(self) -> None:
        if self._away:
            raise ServiceUnavailableError("The controller does not answer; try again")


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def tail(db: Database) -> EventTail:
    return EventTail(db, poll_s=0.005)


@pytest.fixture
def app(settings: Settings, db: Database, gateway: FakeGateway, tail: EventTail) -> Iterator[FastAPI]:
    made = create_app(settings, db, gateway, tail, logs=FakeLogs())
    yield made
    made.state.services.endpoints.close()
    made.state.services.runs.close()
    made.state.services.last_used.close()


@dataclass
class User:
    """A caller with an organisation and a project, and the HTTP client it uses."""

    http: httpx.AsyncClient
    app: FastAPI
    token: str
    org_slug: str
    project_slug: str = ""
    identity_id: str = ""
    job_id: str = ""
    endpoint_id: str = ""

    @property
    def scope(self) -> dict[str, str]:
        return {"orgSlug": self.org_slug, "projectSlug": self.project_slug}

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    async def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A request with this user's token and scope."""
        options["headers"] = {**self.auth, **options.get("headers", {})}
        options["params"] = {**self.scope, **options.get("params", {})}
        return await self.http.request(method, path, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return await self.call("POST", path, **({"json": body} if body is not None else {}), **options)

    async def patch(self, path: str, body: Any) -> httpx.Response:
        return await self.call("PATCH", path, json=body)

    async def delete(self, path: str, **options: Any) -> httpx.Response:
        return await self.call("DELETE", path, **options)

    async def create_job(self, **config: Any) -> str:
        """The id of a new job."""
        answer = await self.post("/v1/jobs", {"name": "a-run", "config": {**CONFIG, **config}})
        assert answer.status_code == 201, answer.text
        return answer.json()["job"]["id"]

    async def create_endpoint(self, slug: str = "triage", **fields: Any) -> dict[str, Any]:
        """A new endpoint as the wire shows it; of a base model unless `target` says otherwise."""
        target = {"kind": "base_model", "baseModel": "Tiny"}
        body = {"slug": slug, "target": target, "authMode": "fixed_api_key", **fields}
        answer = await self.post("/v1/endpoints", body)
        assert answer.status_code == 201, answer.text
        return answer.json()["deployment"]

    async def open(self, path: str, method: str = "GET", **options: Any) -> AsgiStream:
        """A request whose answer is read while it comes."""
        options["headers"] = {**self.auth, **options.get("headers", {})}
        options["params"] = {**self.scope, **options.get("params", {})}
        return await AsgiStream.open(self.app, method, path, **options)

    async def follow(self, job_id: str, last_event_id: str | None = None) -> AsgiStream:
        headers = {"Last-Event-ID": last_event_id} if last_event_id is not None else {}
        return await self.open(f"/v1/jobs/{job_id}/events/stream", headers=headers)


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://arkor.localhost") as client:
        yield client


@pytest.fixture
def login(http: httpx.AsyncClient, app: FastAPI) -> Callable[[], Any]:
    async def login() -> User:
        """A new user with a project of its own."""
        made = (await http.post("/v1/auth/anonymous", json={"kind": "cli"})).json()
        user = User(http, app, made["token"], made["personalOrg"]["slug"], identity_id=made["anonymousId"])
        project = await user.post("/v1/projects", {"name": "Project", "slug": f"project-{next(_numbers)}"})
        assert project.status_code == 201, project.text
        user.project_slug = project.json()["project"]["slug"]
        return user

    return login


@pytest.fixture
async def user(login: Callable[[], Any]) -> User:
    return await login()


class Training:
    """What a job's driver and recorder would do, told by the test."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._store = open_store(settings.storage_url)

    def start(self, job_id: str) -> None:
        with self._db.write() as session:
            publisher.start(session, job_id, {"metadata": {}})

    def log(self, job_id: str, step: int, loss: float | None = 1.0) -> None:
        with self._db.write() as session:
            publisher.append(session, job_id, event.LOG, {"step": step, "loss": loss}, key=f"log:{step}")

    def save(self, job_id: str, step: int) -> CheckpointManifest:
        """A checkpoint: its files in storage, its row, its event."""
        manifest = self._store_adapter(job_id, step, final=False)
        with self._db.write() as session:
            checkpoints.record(session, manifest).ready = True
            publisher.append(session, job_id, event.CHECKPOINT, {"step": step}, key=f"checkpoint:{step}")
        return manifest

    def complete(self, job_id: str, step: int = 4) -> CheckpointManifest:
        manifest = self._store_adapter(job_id, step, final=True)
        with self._db.write() as session:
            checkpoints.record(session, manifest).ready = True
            publisher.finish(session, job_id, JobStatus.COMPLETED, type=event.COMPLETED, fields={"step": step})
        return manifest

    def fail(self, job_id: str, error: str = "out of data") -> None:
        with self._db.write() as session:
            publisher.finish(session, job_id, JobStatus.FAILED, type=event.FAILED, fields={"error": error}, error=error)

    def _store_adapter(self, job_id: str, step: int, *, final: bool) -> CheckpointManifest:
        adapter_id = layout.final_adapter_id(job_id) if final else layout.adapter_id(job_id, step)
        contents = {"adapter_model.safetensors": WEIGHTS, "adapter_config.json": b"{}", "nested/tokenizer.json": b"[]"}
        for path, data in contents.items():
            self._store.put(layout.adapter_prefix(adapter_id) + path, data)
        return CheckpointManifest(
            adapter_id=adapter_id,
            job_id=job_id,
            step=step,
            final=final,
            base_model="base/model",
            base_precision="fp32",
            r=16,
            lora_alpha=16,
            target_modules=["q_proj"],
            metrics={"loss": 1.0},
            files=[ManifestFile(path=path, size_bytes=len(data), sha256="0" * 64) for path, data in contents.items()],
            created_at=utcnow(),
        )


@pytest.fixture
def training(db: Database, settings: Settings) -> Training:
    return Training(db, settings)
