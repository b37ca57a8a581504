"""Scope: a token opens its own organisation's projects, and what lies elsewhere does not even seem to exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.api.conftest import CONFIG, Training, User

pytestmark = pytest.mark.anyio

JOB = {"name": "x", "config": CONFIG}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "baseModel": "Tiny", "stream": False}
# Method, path, body; JOB_ID stands for a job of another user.
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
]


@pytest.fixture
async def other(login: Callable[[], Any], training: Training) -> User:
    """Another user, whose one job is completed and whose project has the same slug as the first user's."""
    made: User = await login()
    job_id = await made.create_job()
    training.complete(job_id)
    made.job_id = job_id
    return made


def for_job(body: Any, job_id: str) -> Any:
    if isinstance(body, dict) and "adapter" in body:
        return {**body, "adapter": {**body["adapter"], "jobId": job_id}}
    return body


@pytest.mark.parametrize(("method", "path", "body"), [*ORG_CALLS, *PROJECT_CALLS, *JOB_CALLS])
async def test_every_call_needs_a_token(user: User, method: str, path: str, body: Any) -> None:
    user.token = "arkt_wrong"
    answer = await user.call(method, path, **({"json": body} if body else {}))
    assert answer.status_code == 401


@pytest.mark.parametrize(("method", "path", "body"), [*ORG_CALLS, *PROJECT_CALLS, *JOB_CALLS])
async def test_foreign_and_unknown_orgs_are_403(user: User, other: User, method: str, path: str, body: Any) -> None:
    job_id = other.job_id
    for org_slug in (other.org_slug, "nowhere"):
        answer = await user.call(
            method,
            path.replace("JOB_ID", job_id),
            params={"orgSlug": org_slug, "projectSlug": other.project_slug},
            **({"json": for_job(body, job_id)} if body else {}),
        )
        assert answer.status_code == 403, answer.text
        assert answer.json()["code"] == "forbidden"


@pytest.mark.parametrize(("method", "path", "body"), [*PROJECT_CALLS, *JOB_CALLS])
async def test_unknown_project_is_404_and_says_how_to_recover(
    user: User, other: User, method: str, path: str, body: Any
) -> None:
    for project_slug in (other.project_slug, "gone"):
        answer = await user.call(
            method,
            path.replace("JOB_ID", other.job_id),
            params={"projectSlug": project_slug},
            **({"json": for_job(body, other.job_id)} if body else {}),
        )
        assert answer.status_code == 404
        assert "delete .arkor/state.json" in answer.json()["error"]


@pytest.mark.parametrize(("method", "path", "body"), JOB_CALLS)
async def test_foreign_job_answers_like_a_missing_one(
    user: User, other: User, method: str, path: str, body: Any
) -> None:
    answers = []
    for job_id in (other.job_id, "00000000-0000-4000-8000-000000000000"):
        answer = await user.call(
            method, path.replace("JOB_ID", job_id), **({"json": for_job(body, job_id)} if body else {})
        )
        assert answer.status_code == 404
        answers.append(answer.text.replace(job_id, "ID"))
    assert answers[0] == answers[1]


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
