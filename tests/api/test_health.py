"""Health, readiness, the catalogue, and the description of the API."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from arkor_ray.api import readiness
from arkor_ray.api.app import create_app
from arkor_ray.api.error_handlers import OPENAI_PATHS
from arkor_ray.api.readiness import Readiness
from arkor_ray.db.session import Database
from arkor_ray.settings import Settings
from tests.api.conftest import FakeGateway

pytestmark = pytest.mark.anyio

# Sections 2 to 9 of the contract, and ours.
ROUTES = {
    "/e/{slug}/v1/chat/completions": {"post"},
    "/e/{slug}/v1/models": {"get"},
    "/healthz": {"get"},
    "/readyz": {"get"},
    "/v1/auth/anonymous": {"post"},
    "/v1/auth/cli/config": {"get"},
    "/v1/chat/completions": {"post"},
    "/v1/endpoints": {"get", "post"},
    "/v1/endpoints/{endpoint_id}": {"delete", "get", "patch"},
    "/v1/endpoints/{endpoint_id}/keys": {"get", "post"},
    "/v1/endpoints/{endpoint_id}/keys/{key_id}": {"delete"},
    "/v1/endpoints/{endpoint_id}/runs": {"get"},
    "/v1/endpoints/{endpoint_id}/runs/export": {"get"},
    "/v1/inference/chat": {"post"},
    "/v1/jobs": {"get", "post"},
    "/v1/jobs/{job_id}": {"get"},
    "/v1/jobs/{job_id}/cancel": {"post"},
    "/v1/jobs/{job_id}/checkpoints": {"get"},
    "/v1/jobs/{job_id}/checkpoints/{ref}": {"get"},
    "/v1/jobs/{job_id}/checkpoints/{ref}/files/{path}": {"get"},
    "/v1/jobs/{job_id}/events/stream": {"get"},
    "/v1/jobs/{job_id}/logs": {"get"},
    "/v1/me": {"get"},
    "/v1/models": {"get"},
    "/v1/models/{model}": {"get"},
    "/v1/projects": {"get", "post"},
    "/v1/tokens": {"get", "post"},
    "/v1/tokens/{token_id}": {"delete"},
}


async def test_healthz_needs_nothing(http: httpx.AsyncClient) -> None:
    answer = await http.get("/healthz")
    assert answer.status_code == 200 and answer.json()["status"] == "ok"


async def test_readyz_asks_database_and_storage(http: httpx.AsyncClient) -> None:
    answer = await http.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "checks": {"database": "ok", "storage": "ok"}}


async def test_database_without_its_schema_is_not_ready(
    settings: Settings, tmp_path: Path, gateway: FakeGateway
) -> None:
    app = create_app(settings, Database(f"sqlite:///{tmp_path / 'empty.db'}"), gateway)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://arkor.localhost") as http:
        answer = await http.get("/readyz")
        assert answer.status_code == 503 and answer.json()["status"] == "unavailable"
        checks = answer.json()["checks"]
        assert checks["storage"] == "ok" and checks["database"].startswith("fails with OperationalError")
        assert (await http.get("/healthz")).status_code == 200


async def test_reason_of_a_failing_check_names_no_host() -> None:
    def failing() -> None:
        raise ConnectionError("10.0.0.7 refused")

    assert await Readiness({"storage": failing}).report() == {
        "storage": "fails with ConnectionError; the server's log says more"
    }


async def test_check_that_hangs_is_reported_and_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "LIMIT_S", 0.01)
    release, calls = threading.Event(), []

    def hanging() -> None:
        calls.append(1)
        release.wait(20)

    checks = Readiness({"storage": hanging, "database": lambda: None})
    for _ in range(3):
        assert await checks.report() == {"storage": "does not answer within 0.01 s", "database": "ok"}
    assert len(calls) == 1
    release.set()
    await asyncio.wait({checks._running["storage"]})
    monkeypatch.setattr(readiness, "LIMIT_S", 20)
    assert (await checks.report())["storage"] == "ok", "it is well again once the part answers"


async def test_description_of_the_api_has_every_route_with_a_title(app: FastAPI) -> None:
    described = app.openapi()
    assert {path: set(methods) for path, methods in described["paths"].items()} == ROUTES
    operations = [operation for methods in described["paths"].values() for operation in methods.values()]
    paths = [path for path, methods in described["paths"].items() for _ in methods]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for path, operation in zip(paths, operations, strict=True):
        assert operation["summary"]
        body = "OpenAIErrorBody" if path.startswith(OPENAI_PATHS) else "ErrorBody"
        assert operation["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{body}")
        assert "422" not in operation["responses"], "that is not how errors look here"
