"""A checkpoint whose adapter was swept: it was announced once, so every way to it says that it is gone, and what is left."""

from __future__ import annotations

import pytest

from arkor_ray.db import checkpoints
from arkor_ray.db.session import Database
from tests.api.conftest import Training, User

pytestmark = pytest.mark.anyio


@pytest.fixture
async def job_id(user: User, training: Training, db: Database) -> str:
    """A completed job of which the checkpoint at step 2 was removed, and those at 4 and the end were not."""
    made = await user.create_job()
    for step in (2, 4):
        training.save(made, step)
    training.complete(made)
    with db.write() as session:
        assert checkpoints.remove(session, f"{made}-step-2")
    return made


def gone(answer) -> str:
    assert (answer.status_code, answer.json()["code"]) == (410, "gone"), answer.text
    return answer.json()["error"]


async def test_it_is_gone_in_every_route_and_the_others_are_there(user: User, job_id: str) -> None:
    path = f"/v1/jobs/{job_id}/checkpoints"
    listed = (await user.get(path)).json()["checkpoints"]
    assert [c["step"] for c in listed if c["kind"] == "checkpoint"] == [4]
    said = gone(await user.get(f"{path}/2"))
    assert "step 2 was removed" in said and "Its checkpoints are at steps 4" in said
    gone(await user.get(f"{path}/2/files/adapter_config.json"))
    adapter = {"kind": "checkpoint", "jobId": job_id, "step": 2}
    messages = [{"role": "user", "content": "hi"}]
    gone(await user.post("/v1/inference/chat", {"adapter": adapter, "messages": messages, "stream": False}))
    target = {"kind": "adapter", "adapter": adapter}
    gone(await user.post("/v1/endpoints", {"slug": "triage", "target": target, "authMode": "none"}))
    assert (await user.get(f"{path}/3")).status_code == 404, "there never was one"


async def test_openai_clients_are_told_too(user: User, job_id: str) -> None:
    body = {"model": f"{job_id}:2", "messages": [{"role": "user", "content": "hi"}]}
    answer = await user.post("/v1/chat/completions", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "gone")
    assert answer.json()["error"]["param"] == "model"
    listed = (await user.get("/v1/models")).json()["data"]
    assert f"{job_id}:2" not in {model["id"] for model in listed}
