"""Jobs on the wire: what creating one answers, what is echoed, what is refused, how one is cancelled."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.contract.conftest import SECRET, UNKNOWN, Recorded
from tests.contract.wire import ISO, MODEL, UUID, Caller, assert_error, frames

pytestmark = pytest.mark.integration

CONFIG: dict[str, Any] = {"model": MODEL, "datasetSource": {"type": "huggingface", "name": "arkorlab/triage-demo"}}
STATUSES = {"queued", "running", "completed", "failed", "cancelled"}


def assert_job(job: dict[str, Any], caller: Caller) -> None:
    """What the client's schema asks of a job object."""
    assert UUID.fullmatch(job["id"])
    assert job["orgId"] == caller.org_id and job["projectId"] == caller.project_id
    assert isinstance(job["name"], str) and job["status"] in STATUSES
    assert isinstance(job["config"]["model"], str)
    assert job.get("error") is None or isinstance(job["error"], str)
    assert ISO.fullmatch(job["createdAt"])
    assert all(job.get(name) is None or ISO.fullmatch(job[name]) for name in ("startedAt", "completedAt"))


@pytest.fixture
def created(caller: Caller) -> dict[str, Any]:
    answer = caller.post("/v1/jobs", {"name": "to be cancelled", "config": {**CONFIG, "maxSteps": 2}})
    assert answer.status_code == 201
    return answer.json()["job"]


def test_created_job_is_queued_and_whole(submitted: tuple[Recorded, threading.Thread], caller: Caller) -> None:
    job = submitted[0].job
    assert_job(job, caller)
    assert (job["status"], job["name"]) == ("queued", "contract-run")


def test_config_is_echoed_as_it_was_sent_without_the_token(finished: Recorded, caller: Caller) -> None:
    source = {name: value for name, value in finished.sent["datasetSource"].items() if name != "token"}
    wanted = {**finished.sent, "datasetSource": source}
    fetched = caller.get(f"/v1/jobs/{finished.id}")
    assert finished.job["config"] == fetched.json()["job"]["config"] == wanted
    assert wanted.items() >= UNKNOWN.items()


@pytest.mark.parametrize("path", ["", "/events/stream", "/logs", "/checkpoints", "/checkpoints/final"])
def test_token_of_the_dataset_is_nowhere(finished: Recorded, caller: Caller, path: str) -> None:
    answer = caller.get(f"/v1/jobs/{finished.id}{path}")
    assert answer.status_code == 200 and SECRET not in answer.text
    assert SECRET not in caller.get("/v1/jobs").text


def test_finished_job_comes_with_the_data_of_its_events(finished: Recorded, caller: Caller, log: bytes) -> None:
    answer = caller.get(f"/v1/jobs/{finished.id}").json()
    assert_job(answer["job"], caller)
    assert answer["job"]["status"] == "completed"
    assert answer["job"]["startedAt"] and answer["job"]["completedAt"] and answer["job"].get("error") is None
    assert answer["events"] == [frame.json for frame in frames(log) if frame.id is not None]


def test_cancelled_job_says_so_at_once_and_can_be_cancelled_once(caller: Caller, created: dict[str, Any]) -> None:
    path = f"/v1/jobs/{created['id']}"
    final = {"kind": "final", "jobId": created["id"]}
    assert "queued" in assert_error(caller.chat(adapter=final), 409, "conflict")["error"]
    cancelled = caller.post(f"{path}/cancel")
    assert (cancelled.status_code, cancelled.json()) == (200, {"ok": True})
    assert "Job is already cancelled" in assert_error(caller.post(f"{path}/cancel"), 409, "conflict")["error"]
    job = caller.get(path).json()["job"]
    assert_job(job, caller)
    assert job["status"] == "cancelled" and job["completedAt"]
    [event, end] = frames(caller.events(created["id"]))
    assert (event.id, event.event, event.json["type"]) == (1, "training.cancelled", "training.cancelled")
    assert (end.id, end.event) == (None, "end")
    assert_error(caller.chat(adapter=final), 404, "not_found")


def test_list_is_newest_first(finished: Recorded, caller: Caller, created: dict[str, Any]) -> None:
    assert caller.post(f"/v1/jobs/{created['id']}/cancel").status_code == 200
    jobs = caller.get("/v1/jobs").json()["jobs"]
    assert jobs[0]["id"] == created["id"] and finished.id in [job["id"] for job in jobs]
    assert [job["createdAt"] for job in jobs] == sorted((job["createdAt"] for job in jobs), reverse=True)
    for job in jobs:
        assert_job(job, caller)


def test_finished_job_cannot_be_cancelled(finished: Recorded, caller: Caller) -> None:
    answer = caller.post(f"/v1/jobs/{finished.id}/cancel")
    assert "Job is already completed" in assert_error(answer, 409, "conflict")["error"]
    assert caller.get(f"/v1/jobs/{finished.id}").json()["job"]["status"] == "completed"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model": "no/such"}, MODEL),  # the accepted names are listed
        ({"model": ""}, "model"),
        ({"datasetSource": {"type": "s3"}}, "datasetSource"),
        ({"datasetSource": {"type": "huggingface"}}, "datasetSource.name"),
        ({"datasetSource": {"type": "blob", "url": "ftp://host/x"}}, "datasetSource.url"),
        ({"datasetFormat": {"type": "xml"}}, "datasetFormat"),
        ({"datasetSplit": {"enabled": True, "testSize": 2}}, "datasetSplit.testSize"),
        ({"maxSteps": 0}, "maxSteps"),
        ({"maxSteps": 1.5}, "maxSteps"),
        ({"numTrainEpochs": -1}, "numTrainEpochs"),
        ({"learningRate": "fast"}, "learningRate"),
        ({"learningRate": 0}, "learningRate"),
        ({"batchSize": True}, "batchSize"),
        ({"optim": "magic"}, "optim"),
        ({"lrSchedulerType": "zigzag"}, "lrSchedulerType"),
        ({"warmupSteps": -1}, "warmupSteps"),
        ({"loggingSteps": 0}, "loggingSteps"),
        ({"saveSteps": {"steps": 2, "ratio": 0.5}}, "saveSteps"),
        ({"evalSteps": {"ratio": 1}}, "evalSteps.ratio"),
        ({"evalSteps": {}}, "evalSteps"),
        ({"loraR": 0}, "loraR"),
        ({"maxLength": 1}, "maxLength"),
        ({"loadIn4bit": "perhaps"}, "loadIn4bit"),
        ({"trainOnResponsesOnly": "yes"}, "trainOnResponsesOnly"),
        ({"gpuTypes": []}, "gpuTypes"),
    ],
)
def test_value_that_could_not_train_is_400_by_its_name(caller: Caller, fields: dict[str, Any], named: str) -> None:
    before = len(caller.get("/v1/jobs").json()["jobs"])
    answer = caller.post("/v1/jobs", {"name": "bad", "config": {**CONFIG, **fields}})
    assert named in assert_error(answer, 400)["error"]
    assert len(caller.get("/v1/jobs").json()["jobs"]) == before, "no job that only fails later"
