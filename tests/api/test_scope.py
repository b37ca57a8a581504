"""Scope: a token opens its own organisation's projects, and what lies elsewhere does not even seem to exist."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from tests.api.conftest import CONFIG, Training, User

pytestmark = pytest.mark.anyio

JOB = {"name": "x", "config": CONFIG}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "baseModel": "Tiny", "stream": False}
ADAPTER = {"kind": "adapter", "adapter": {"kind": "final", "jobId": "JOB_ID"}}
# Method, path, body; JOB_ID stands for a job of another user, ENDPOINT_ID for an endpoint.
ORG_CALLS = [
    ("GET", "/v1/projects", None),
    ("POST", "/v1/projects", {"name": "x", "slug": "x"}),
    ("GET", "/v1/tokens", None),
    ("POST", "/v1/tokens", {"label": "x"}),
    ("DELETE", "/v1/tokens/none", None),
]
PROJECT_CALLS = [
    ("POST", "/v1/jobs", JOB),
    ("GET", "/v1/jobs", None),
    ("POST", "/v1/inference/chat", CHAT),
    ("GET", "/v1/endpoints", None),
]
JOB_CALLS = [
    ("GET", "/v1/jobs/JOB_ID", None),
    ("POST", "/v1/jobs/JOB_ID/cancel", None),
    ("GET", "/v1/jobs/JOB_ID/logs", None),
    ("GET", "/v1/jobs/JOB_ID/events/stream", None),
    ("GET", "/v1/jobs/JOB_ID/checkpoints", None),
    ("GET", "/v1/jobs/JOB_ID/checkpoints/final", None),
    ("GET", "/v1/jobs/JOB_ID/checkpoints/final/files/adapter_config.json", None),
    ("POST", "/v1/inference/chat", {**CHAT, "baseModel": None, "adapter": {"kind": "final", "jobId": "JOB_ID"}}),
    ("POST", "/v1/endpoints", {"slug": "new", "authMode": "none", "target": ADAPTER}),
]
ENDPOINT_CALLS = [
    ("GET", "/v1/endpoints/ENDPOINT_ID", None),
    ("PATCH", "/v1/endpoints/ENDPOINT_ID", {"enabled": False}),
    ("DELETE", "/v1/endpoints/ENDPOINT_ID", None),
    ("GET", "/v1/endpoints/ENDPOINT_ID/keys", None),
    ("POST", "/v1/endpoints/ENDPOINT_ID/keys", {"label": "x"}),
    ("DELETE", "/v1/endpoints/ENDPOINT_ID/keys/none", None),
    ("GET", "/v1/endpoints/ENDPOINT_ID/runs", None),
    ("GET", "/v1/endpoints/ENDPOINT_ID/runs/export", None),
]
THING_CALLS = [*JOB_CALLS, *ENDPOINT_CALLS]


@pytest.fixture
async def other(login: Callable[[], Any], training: Training) -> User:
    """Another user, with a completed job and an endpoint, whose project has the same slug as the first user's."""
    made: User = await login()
    job_id = await made.create_job()
    training.complete(job_id)
    made.job_id = job_id
    made.endpoint_id = (await made.create_endpoint())["id"]
    return made


async def call(user: User, method: str, path: str, body: Any, *, job_id: str, endpoint_id: str, **params: str) -> Any:
    """The answer to a call of the tables, with these ids and this scope."""
    content = json.dumps(body).replace("JOB_ID", job_id) if body else None
    path = path.replace("JOB_ID", job_id).replace("ENDPOINT_ID", endpoint_id)
    return await user.call(method, path, params=params, content=content)


@pytest.mark.parametrize(("method", "path", "body"), [*ORG_CALLS, *PROJECT_CALLS, *THING_CALLS])
async def test_every_call_needs_a_token(user: User, method: str, path: str, body: Any) -> None:
    user.token = "arkt_wrong"
    answer = await user.call(method, path, **({"json": body} if body else {}))
    assert answer.status_code == 401


async def test_tables_have_every_route_with_a_scope(app: FastAPI) -> None:
    """A route that asks for an organisation and is in no table would be tested by nobody."""
    tried = [(method, path) for method, path, _ in (*ORG_CALLS, *PROJECT_CALLS, *THING_CALLS)]
    for path, methods in app.openapi()["paths"].items():
        pattern = re.compile(re.sub(r"{(\w+)}", lambda name: ".+" if name[1] == "path" else "[^/]+", path))
        for method, operation in methods.items():
            if any(parameter["name"] == "orgSlug" for parameter in operation.get("parameters", [])):
                assert any(method.upper() == m and pattern.fullmatch(p) for m, p in tried), f"{method} {path}"


@pytest.mark.parametrize(("method", "path", "body"), [*ORG_CALLS, *PROJECT_CALLS, *THING_CALLS])
async def test_foreign_and_unknown_orgs_are_403(user: User, other: User, method: str, path: str, body: Any) -> None:
    ids = {"job_id": other.job_id, "endpoint_id": other.endpoint_id}
    for org_slug in (other.org_slug, "nowhere"):
        answer = await call(user, method, path, body, **ids, orgSlug=org_slug, projectSlug=other.project_slug)
        assert answer.status_code == 403, answer.text
        assert answer.json()["code"] == "forbidden"


@pytest.mark.parametrize(("method", "path", "body"), [*PROJECT_CALLS, *THING_CALLS])
async def test_unknown_project_is_404_and_says_how_to_recover(
    user: User, other: User, method: str, path: str, body: Any
) -> None:
    ids = {"job_id": other.job_id, "endpoint_id": other.endpoint_id}
    for project_slug in (other.project_slug, "gone"):
        answer = await call(user, method, path, body, **ids, projectSlug=project_slug)
        assert answer.status_code == 404
        assert "delete .arkor/state.json" in answer.json()["error"]


@pytest.mark.parametrize(("method", "path", "body"), THING_CALLS)
async def test_foreign_thing_answers_like_a_missing_one(
    user: User, other: User, method: str, path: str, body: Any
) -> None:
    missing = "00000000-0000-4000-8000-000000000000"
    answers = []
    for ids in (
        {"job_id": other.job_id, "endpoint_id": other.endpoint_id},
        dict.fromkeys(("job_id", "endpoint_id"), missing),
    ):
        answer = await call(user, method, path, body, **ids)
        assert answer.status_code == 404
        answers.append(answer.text.replace(ids["job_id"], "ID").replace(ids["endpoint_id"], "ID"))
    assert answers[0] == answers[1]


async def test_foreign_changes_change_nothing(user: User, other: User) -> None:
    path = f"/v1/endpoints/{other.endpoint_id}"
    key = (await other.post(f"{path}/keys", {"label": "x"})).json()["key"]
    own = await user.create_endpoint("own")
    assert (await user.patch(path, {"enabled": False})).status_code == 404
    assert (await user.delete(f"{path}/keys/{key['id']}")).status_code == 404
    assert (await user.delete(f"/v1/endpoints/{own['id']}/keys/{key['id']}")).status_code == 404
    assert (await user.delete(path)).status_code == 404
    assert (await other.get(path)).json()["deployment"]["enabled"] is True
    assert (await other.get(f"{path}/keys")).json()["keys"][0]["enabled"] is True
    listed = (await user.get("/v1/endpoints")).json()["deployments"]
    assert [endpoint["slug"] for endpoint in listed] == ["own"]


async def test_job_of_another_project_of_the_same_org_is_404(user: User) -> None:
    job_id = await user.create_job()
    await user.post("/v1/projects", {"name": "second", "slug": "second"})
    answer = await user.get(f"/v1/jobs/{job_id}", params={"projectSlug": "second"})
    assert answer.status_code == 404
    assert (await user.get("/v1/jobs", params={"projectSlug": "second"})).json() == {"jobs": []}


async def test_foreign_cancel_changes_nothing(user: User, login: Callable[[], Any]) -> None:
    other: User = await login()
    job_id = await other.create_job()
    assert (await user.post(f"/v1/jobs/{job_id}/cancel")).status_code == 404
    assert (await other.get(f"/v1/jobs/{job_id}")).json()["job"]["status"] == "queued"
