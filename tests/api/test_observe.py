"""What requests leave behind: ids, counts, durations, spans."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from arkor_ray.telemetry import logs, tracing
from arkor_ray.telemetry.metrics import API_REQUEST_SECONDS, API_REQUESTS
from tests.api.conftest import CONFIG, FakeGateway, User
from tests.telemetry.recorded import Recorded
from tests.telemetry.test_tracing import CALLER

pytestmark = pytest.mark.anyio

CHAT = {"messages": [{"role": "user", "content": "hi"}], "baseModel": "Tiny"}


async def test_requests_are_counted_by_template_method_and_status(user: User, recorded: Recorded) -> None:
    job_id = await user.create_job()
    for _ in range(2):
        assert (await user.get(f"/v1/jobs/{job_id}")).status_code == 200
    assert (await user.get("/v1/jobs/00000000-0000-4000-8000-000000000000")).status_code == 404
    assert (await user.http.get("/v1/me", headers={"Authorization": "Bearer wrong"})).status_code == 401
    await user.get("/v1/nothing/at/all")
    await user.http.request("BREW", "/v1/coffee")
    counted = {
        (method, route, status): recorded.total(API_REQUESTS, method=method, route=route, status=status)
        for method, route, status in [
            ("POST", "/v1/jobs", "201"),
            ("GET", "/v1/jobs/{job_id}", "200"),
            ("GET", "/v1/jobs/{job_id}", "404"),
            ("GET", "/v1/me", "401"),
            ("GET", "none", "404"),
            ("other", "none", "404"),
        ]
    }
    assert list(counted.values()) == [1, 2, 1, 1, 1, 1]
    assert len(recorded.all(API_REQUEST_SECONDS, route="/v1/jobs/{job_id}", method="GET")) == 3


async def test_a_fault_of_ours_is_counted_as_one(user: User, gateway: FakeGateway, recorded: Recorded) -> None:
    gateway.fail(RuntimeError("the engine is gone"))
    assert (await user.post("/v1/inference/chat", CHAT)).status_code == 500
    assert recorded.total(API_REQUESTS, status="500") == 1


async def test_a_client_that_leaves_before_its_answer_is_told_apart(
    user: User, gateway: FakeGateway, recorded: Recorded
) -> None:
    gateway.hang()
    stream = await user.open("/v1/inference/chat", method="POST", body=CHAT, wait=False)
    while not gateway.running:
        await asyncio.sleep(0.01)
    stream.disconnect()
    await stream.ended()
    assert recorded.total(API_REQUESTS, route="/v1/inference/chat", status="499") == 1


@pytest.mark.parametrize("given", ["abc-123", "Root=1-67891233-abcdef012345678912345678", "x" * 128])
async def test_a_request_id_comes_back(http: httpx.AsyncClient, given: str) -> None:
    assert (await http.get("/healthz", headers={"X-Request-Id": given})).headers["x-request-id"] == given


@pytest.mark.parametrize(
    ("given", "kept"), [("x" * 129, "x" * 128), ("a b\tc", "abc"), ('ä"id"=1'.encode(), "id=1"), ("<script>", "script")]
)
async def test_of_one_that_may_not_stand_in_a_log_the_rest_is_kept(
    http: httpx.AsyncClient, given: Any, kept: str
) -> None:
    assert (await http.get("/healthz", headers={"X-Request-Id": given})).headers["x-request-id"] == kept


@pytest.mark.parametrize("given", [None, "", "<>"])
async def test_where_there_is_none_each_request_gets_one(http: httpx.AsyncClient, given: Any) -> None:
    headers = {} if given is None else {"X-Request-Id": given}
    answers = [await http.get("/healthz", headers=headers) for _ in range(2)]
    found = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(found)) == 2 and all(len(each) == 32 and each.isalnum() for each in found)


async def test_errors_have_the_id_in_the_header_and_the_contracts_envelope(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/nothing", headers={"X-Request-Id": "mine"})
    assert answer.headers["x-request-id"] == "mine" and set(answer.json()) == {"error", "code"}


async def test_log_lines_of_a_request_name_it(user: User, gateway: FakeGateway, caplog: Any) -> None:
    lines = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(logs.JsonLines().format(record)))

    keeper = Keeper()
    logging.getLogger("arkor_ray").addHandler(keeper)
    try:
        gateway.fail(RuntimeError("the engine is gone"))
        await user.post("/v1/inference/chat", CHAT, headers={"X-Request-Id": "mine"})
    finally:
        logging.getLogger("arkor_ray").removeHandler(keeper)
    assert [line["request_id"] for line in lines if line["level"] == "ERROR"] == ["mine"]


async def test_a_request_is_a_span_below_its_callers(user: User, spans: Any) -> None:
    before = len(spans())
    await user.post("/v1/jobs", {"name": "a-run", "config": CONFIG}, headers={"traceparent": CALLER})
    submission, request = spans()[before:]
    assert (request.name, request.kind.name) == ("POST /v1/jobs", "SERVER")
    assert request.attributes["http.response.status_code"] == 201
    assert f"{request.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{request.parent.span_id:016x}" == CALLER.split("-")[2]
    job_id = submission.attributes["arkor.job_id"]
    assert f"{submission.context.trace_id:032x}" == tracing.job_traceparent(job_id).split("-")[1]
    assert submission.links[0].context.span_id == request.context.span_id
