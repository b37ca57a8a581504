"""The API on a real Ray Serve: sockets, proxies and replicas between the client and the routes, no model behind them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from arkor_ray.client.event_stream import EventStreamParser
from arkor_ray.db.session import Database
from arkor_ray.errors import NotFoundError
from arkor_ray.events import publisher
from arkor_ray.schemas import event
from arkor_ray.serving.app import application_name
from arkor_ray.settings import Settings
from tests.servers.processes import free_port

pytestmark = pytest.mark.integration

CHAT = {"messages": [{"role": "user", "content": "hi"}], "baseModel": "tiny"}


class LLMServer:
    """Answers without a model, and counts what runs. What it does is in the user's message."""

    def __init__(self) -> None:
        self.running = 0
        self.cancelled = 0

    async def chat(self, request: dict[str, Any], adapter_id: str | None) -> AsyncIterator[dict[str, Any]]:
        content = request["messages"][-1]["content"]
        if content == "unknown":
            raise NotFoundError("No such adapter", param="adapter")
        if content.startswith("die once "):
            mark = Path(content.removeprefix("die once "))
            if not mark.exists():
                mark.touch()
                os._exit(1)
        self.running += 1
        try:
            yield {"type": "start", "prompt_tokens": 1, "system_fingerprint": f"fp-{os.getpid()}"}
            while content == "for ever":
                yield {"type": "delta", "text": "a"}
                await asyncio.sleep(0.02)
            yield {"type": "delta", "text": "hello"}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            yield {"type": "end", "finish_reason": "stop", "usage": usage}
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def stats(self) -> dict[str, int]:
        return {"running": self.running, "cancelled": self.cancelled, "pid": os.getpid()}


class Controller:
    """Starts the application above instead of one with a model."""

    def ensure_serving(self, base_model: str, base_precision: str) -> None:
        from ray import serve

        if application_name(base_model, base_precision) in serve.status().applications:
            return
        deployment = serve.deployment(LLMServer, name="LLMServer", ray_actor_options={"num_cpus": 0})
        serve.run(deployment.bind(), name=application_name(base_model, base_precision), route_prefix=None)

    def default_precision(self) -> str:
        return "fp32"

    def driver_logs(self, submission: str) -> str:
        return f"output of {submission}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A Ray of our own with the API on a free port; the inference application starts when a chat needs it."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from arkor_ray.api.serve_app import build_api

    folder = tmp_path_factory.mktemp("api")
    settings = Settings(data_dir=folder, cache_dir=folder, models={"tiny": "base/tiny"}, port=free_port())
    ray.init(
        address="local", namespace="arkor", num_cpus=2, include_dashboard=False, log_to_driver=False,
        object_store_memory=100 * 2**20,
    )  # fmt: skip
    try:
        ray.remote(Controller).options(name="arkor-controller", num_cpus=0, lifetime="detached").remote()
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=settings.port))
        serve.run(build_api(settings), name="arkor", route_prefix="/")
        database = Database(settings.database_url)
        with httpx.Client(base_url=settings.api_url, timeout=60) as http:
            made = http.post("/v1/auth/anonymous", json={"kind": "cli"}).json()
            http.headers["Authorization"] = f"Bearer {made['token']}"
            http.params = httpx.QueryParams(orgSlug=made["personalOrg"]["slug"], projectSlug="p")
            assert http.post("/v1/projects", json={"name": "P", "slug": "p"}).status_code == 201
            yield SimpleNamespace(http=http, db=database, settings=settings)
        database.close()
        serve.shutdown()
    finally:
        ray.shutdown()


def create_job(http: httpx.Client) -> str:
    config = {"model": "tiny", "datasetSource": {"type": "huggingface", "name": "owner/data"}}
    answer = http.post("/v1/jobs", json={"name": "run", "config": config})
    assert answer.status_code == 201, answer.text
    return answer.json()["job"]["id"]


def stats() -> dict[str, int]:
    from ray import serve

    return serve.get_deployment_handle("LLMServer", application_name("base/tiny", "fp32")).stats.remote().result()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def say(content: str, **fields: Any) -> dict[str, Any]:
    return {**CHAT, "messages": [{"role": "user", "content": content}], **fields}


def test_ready_and_described(world: SimpleNamespace) -> None:
    assert world.http.get("/readyz").json()["status"] == "ok"
    assert "/v1/jobs" in world.http.get("/openapi.json").json()["paths"]
    missing = world.http.get("/v1/nothing/")
    assert missing.status_code == 404 and missing.json()["code"] == "not_found"


def test_events_come_through_the_proxy_one_by_one(world: SimpleNamespace) -> None:
    job_id = create_job(world.http)
    parser = EventStreamParser()
    with world.http.stream("GET", f"/v1/jobs/{job_id}/events/stream") as answer:
        assert answer.status_code == 200, "the headers come before the first event"
        chunks, frames = answer.iter_raw(), []
        for step in range(1, 4):
            with world.db.write() as session:
                publisher.append(session, job_id, event.LOG, {"step": step}, key=f"log:{step}")
            while len(frames) < step:
                frames += parser.feed(next(chunks))
        assert world.http.post(f"/v1/jobs/{job_id}/cancel").status_code == 200
        for chunk in chunks:
            frames += parser.feed(chunk)
    assert [frame.event for frame in frames] == [event.LOG] * 3 + [event.CANCELLED, "end"]


def test_chat_starts_its_application_and_answers_whole_and_streamed(world: SimpleNamespace) -> None:
    whole = world.http.post("/v1/inference/chat", json=say("hi", stream=False)).json()
    assert whole["content"] == "hello" and whole["model"] == "tiny"
    streamed = world.http.post("/v1/inference/chat", json=say("hi"))
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n") and '"content":"hello"' in streamed.text


def test_error_of_the_replica_keeps_its_status_and_field(world: SimpleNamespace) -> None:
    answer = world.http.post("/v1/inference/chat", json=say("unknown"))
    assert answer.status_code == 404
    assert answer.json() == {"error": "not_found: No such adapter", "code": "not_found", "param": "adapter"}


def test_client_that_leaves_stops_the_generation_on_the_replica(world: SimpleNamespace) -> None:
    before = stats()["cancelled"]
    with world.http.stream("POST", "/v1/inference/chat", json=say("for ever")) as answer:
        chunks = answer.iter_raw()  # kept: when the iterator goes, httpx closes the stream
        next(chunks)
        until(lambda: stats()["running"] == 1)
    until(lambda: stats() == {**stats(), "running": 0, "cancelled": before + 1})


def test_replica_that_dies_under_a_request_is_gone_round(world: SimpleNamespace, tmp_path: Path) -> None:
    answer = world.http.post("/v1/inference/chat", json=say(f"die once {tmp_path / 'mark'}", stream=False))
    assert answer.status_code == 200 and answer.json()["content"] == "hello"


def test_replica_that_dies_in_the_middle_ends_the_stream_with_an_error(world: SimpleNamespace) -> None:
    text = ""
    with world.http.stream("POST", "/v1/inference/chat", json=say("for ever")) as answer:
        chunks = answer.iter_text()
        text += next(chunks)
        os.kill(stats()["pid"], signal.SIGKILL)
        text += "".join(chunks)
    last = json.loads(text.rstrip().rpartition("data: ")[2])
    assert "was lost while it answered" in last["error"]["message"]


def test_job_logs_come_from_the_controller(world: SimpleNamespace) -> None:
    from arkor_ray.db.tables import JobRow

    job_id = create_job(world.http)
    with world.db.write() as session:
        session.get_one(JobRow, job_id).attempt = 1
    assert world.http.get(f"/v1/jobs/{job_id}/logs").text == f"output of {job_id}-1"


def test_restarted_api_serves_what_it_had_accepted(world: SimpleNamespace) -> None:
    import ray
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    job_id = create_job(world.http)
    [replica] = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "#Api#" in actor["name"]]
    ray.kill(ray.get_actor(replica["name"], replica["namespace"]))
    until(lambda: _answers(world.http, f"/v1/jobs/{job_id}"))
    assert serve.status().applications["arkor"].status == ApplicationStatus.RUNNING


def _answers(http: httpx.Client, path: str) -> bool:
    try:
        return http.get(path, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
