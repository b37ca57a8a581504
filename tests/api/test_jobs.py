"""Jobs over HTTP: what is accepted, what is echoed, and how a job ends by hand."""

from __future__ import annotations

import json

import pytest

from arkor_ray.db.session import Database
from arkor_ray.db.tables import JobRow
from arkor_ray.settings import Settings
from tests.api.conftest import CONFIG, MODEL, Training, User
from tests.db import databases

pytestmark = [pytest.mark.anyio, databases.both]

BLOB = {"type": "blob", "url": "https://data.example.com/rows.jsonl", "token": "very-secret"}


async def test_created_job_has_every_field_the_client_requires(user: User) -> None:
    answer = await user.post("/v1/jobs", {"name": "triage-run", "config": CONFIG})
    assert answer.status_code == 201
    job = answer.json()["job"]
    assert job["status"] == "queued" and job["name"] == "triage-run" and job["config"] == CONFIG
    assert all(isinstance(job[name], str) for name in ("id", "orgId", "projectId", "createdAt"))
    assert job["error"] is job["startedAt"] is job["completedAt"] is None


async def test_config_of_the_templates_is_accepted_and_echoed_as_sent(user: User) -> None:
    config = {
        **CONFIG,
        "datasetFormat": {"type": "chatml"},
        "maxSteps": 100,
        "evalSteps": 25,
        "loraR": 16,
        "loraAlpha": 16,
        "loadIn4bit": False,
        "gpuTypes": ["A100"],
        "futureField": {"nested": [1, None, "x"]},
    }
    job = (await user.post("/v1/jobs", {"name": "x", "config": config, "future": 1})).json()["job"]
    assert job["config"] == config
    assert (await user.get(f"/v1/jobs/{job['id']}")).json()["job"]["config"] == config


@pytest.mark.parametrize("value", [b"1e999", b"-1e999", b"NaN"])
async def test_number_that_the_database_would_refuse_is_refused_before_it(user: User, value: bytes) -> None:
    content = b'{"name": "x", "config": %s, "futureField": %s}}' % (json.dumps(CONFIG).encode()[:-1], value)
    answer = await user.call("POST", "/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["param"] == "config.futureField"
    assert value.decode() in answer.json()["error"]
    assert (await user.get("/v1/jobs")).json() == {"jobs": []}


@pytest.mark.parametrize("key", ["datasetSource", "dataset_source"])
async def test_token_of_the_dataset_is_kept_apart_and_never_shown(user: User, db: Database, key: str) -> None:
    created = await user.post("/v1/jobs", {"name": "x", "config": {"model": MODEL, key: BLOB}})
    job_id = created.json()["job"]["id"]
    shown = [created, await user.get("/v1/jobs"), await user.get(f"/v1/jobs/{job_id}")]
    assert not any("very-secret" in answer.text for answer in shown)
    assert created.json()["job"]["config"][key] == {"type": "blob", "url": BLOB["url"]}
    with db.read() as session:
        row = session.get_one(JobRow, job_id)
        assert row.dataset_token == "very-secret" and "very-secret" not in str(row.config)


async def test_queue_has_a_limit_per_org(user: User, settings: Settings) -> None:
    object.__setattr__(settings, "max_queued_jobs", 2)
    first, _ = await user.create_job(), await user.create_job()
    answer = await user.post("/v1/jobs", {"name": "x", "config": CONFIG})
    assert answer.status_code == 429 and answer.json()["code"] == "rate_limited" and "retry-after" in answer.headers
    await user.post(f"/v1/jobs/{first}/cancel")
    assert (await user.post("/v1/jobs", {"name": "x", "config": CONFIG})).status_code == 201


async def test_list_is_complete_and_newest_first(user: User) -> None:
    created = [await user.create_job() for _ in range(60)]
    assert [job["id"] for job in (await user.get("/v1/jobs")).json()["jobs"]] == created[::-1]


async def test_job_comes_with_its_events_in_order(user: User, training: Training) -> None:
    job_id = await user.create_job()
    assert (await user.get(f"/v1/jobs/{job_id}")).json()["events"] == []
    training.start(job_id)
    training.log(job_id, 1, loss=float("nan"))
    training.complete(job_id)
    body = (await user.get(f"/v1/jobs/{job_id}")).json()
    assert [data["type"] for data in body["events"]] == ["training.started", "training.log", "training.completed"]
    assert body["events"][1]["loss"] is None and body["events"][1]["jobId"] == job_id
    assert body["job"]["status"] == "completed" and body["job"]["startedAt"] <= body["job"]["completedAt"]


async def test_failed_job_says_why(user: User, training: Training) -> None:
    job_id = await user.create_job()
    training.fail(job_id, "no usable row")
    job = (await user.get(f"/v1/jobs/{job_id}")).json()["job"]
    assert (job["status"], job["error"]) == ("failed", "no usable row") and job["completedAt"] is not None


async def test_cancelled_job_ends_with_its_event(user: User, training: Training) -> None:
    for started in (False, True):
        job_id = await user.create_job()
        if started:
            training.start(job_id)
        answer = await user.post(f"/v1/jobs/{job_id}/cancel")
        assert answer.status_code == 200 and answer.json() == {"ok": True}
        body = (await user.get(f"/v1/jobs/{job_id}")).json()
        assert body["job"]["status"] == "cancelled" and body["job"]["completedAt"] is not None
        assert [data["type"] for data in body["events"]][int(started) :] == ["training.cancelled"]


async def test_cancel_of_an_ended_job_is_conflict(user: User, training: Training) -> None:
    jobs = {status: await user.create_job() for status in ("completed", "failed", "cancelled")}
    training.complete(jobs["completed"])
    training.fail(jobs["failed"])
    await user.post(f"/v1/jobs/{jobs['cancelled']}/cancel")
    for status, job_id in jobs.items():
        answer = await user.post(f"/v1/jobs/{job_id}/cancel")
        assert answer.status_code == 409 and f"Job is already {status}" in answer.json()["error"]
        assert (await user.get(f"/v1/jobs/{job_id}")).json()["job"]["status"] == status


async def test_cancel_forgets_the_token_of_the_dataset(user: User, db: Database) -> None:
    job_id = await user.create_job(datasetSource=BLOB)
    await user.post(f"/v1/jobs/{job_id}/cancel")
    with db.read() as session:
        assert session.get_one(JobRow, job_id).dataset_token is None


async def test_logs_are_those_of_the_newest_attempt(user: User, db: Database) -> None:
    job_id = await user.create_job()
    assert (await user.get(f"/v1/jobs/{job_id}/logs")).text == ""
    with db.write() as session:
        session.get_one(JobRow, job_id).attempt = 2
    answer = await user.get(f"/v1/jobs/{job_id}/logs")
    assert answer.text == f"output of {job_id}-2\n" and answer.headers["content-type"].startswith("text/plain")
