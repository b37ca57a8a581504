"""The public route of endpoints, asked by OpenAI's own client: by path and by host, with keys and without, kept as runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from sqlalchemy import event
from sqlalchemy.orm import Session

from arkor_ray.api.run_store import RunStore
from arkor_ray.db.session import Database
from arkor_ray.errors import InvalidRequestError, ServiceUnavailableError
from arkor_ray.settings import Settings
from arkor_ray.training.chat_format import Conversation, parse_row
from arkor_ray.training.data_sources import parse_rows
from tests.api.conftest import MODEL, FakeGateway, Training, User
from tests.api.openai_client import assert_openai_error, client_of

pytestmark = pytest.mark.anyio

MESSAGES: Any = [{"role": "user", "content": "hi"}]
BODY = {"messages": MESSAGES}
DOMAIN = "models.example.com"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        data_dir=tmp_path,
        cache_dir=tmp_path,
        models={MODEL: "base/model", "Tiny": "base/tiny"},
        endpoints_domain=DOMAIN,
        public_url=f"https://api.{DOMAIN}",
    )


@pytest.fixture
def publish(user: User) -> Callable[..., Any]:
    async def publish(slug: str = "triage", **fields: Any) -> dict[str, Any]:
        """An endpoint of a base model that is open to all, unless told otherwise."""
        return await user.create_endpoint(slug, **{"authMode": "none", **fields})

    return publish


@pytest.fixture
async def endpoint(publish: Callable[..., Any]) -> dict[str, Any]:
    return await publish()


async def create_key(user: User, endpoint: dict[str, Any]) -> dict[str, str]:
    answer = await user.post(f"/v1/endpoints/{endpoint['id']}/keys", {"label": "a key"})
    assert answer.status_code == 201, answer.text
    return answer.json()["key"]


def client_at(user: User, base_url: str, key: str = "dummy", **options: Any) -> openai.AsyncOpenAI:
    return client_of(user, base_url=base_url, api_key=key, **options)


def by_path(slug: str = "triage") -> str:
    return f"http://arkor.localhost/e/{slug}/v1"


def by_host(slug: str = "triage") -> str:
    return f"https://{slug}.{DOMAIN}/v1"


async def runs_of(user: User, endpoint: dict[str, Any], **params: Any) -> list[dict[str, Any]]:
    """Its runs, once all that was kept is written."""
    services = user.app.state.services
    services.runs.close()
    user.app.state.services = replace(services, runs=RunStore(services.db))
    answer = await user.get(f"/v1/endpoints/{endpoint['id']}/runs", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()["runs"]


# Who answers


@pytest.mark.parametrize("base_url", [by_path(), by_host(), by_host("TRIAGE"), f"https://triage.{DOMAIN}.:8443/v1"])
async def test_endpoint_answers_by_path_and_by_host(
    user: User, gateway: FakeGateway, endpoint: dict[str, Any], base_url: str
) -> None:
    answer = await client_at(user, base_url).chat.completions.create(model="whatever", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello there" and answer.model == "Tiny"
    assert gateway.requests[-1]["base_model"] == "base/tiny" and gateway.requests[-1]["adapter_id"] is None
    [model] = (await client_at(user, base_url).models.list()).data
    assert (model.id, model.owned_by) == ("Tiny", "triage") and model.created > 1_700_000_000


async def test_model_in_the_body_is_ignored_and_may_be_missing(
    user: User, gateway: FakeGateway, publish: Callable[..., Any], training: Training
) -> None:
    served, other = await user.create_job(), await user.create_job()
    for job_id in (served, other):
        training.save(job_id, 2)
        training.complete(job_id)
    await publish("final", target={"kind": "adapter", "adapter": {"kind": "final", "jobId": served}})
    await publish("step", target={"kind": "adapter", "adapter": {"kind": "checkpoint", "jobId": served, "step": 2}})
    for slug, name, adapter_id in (("final", served, f"{served}-final"), ("step", f"{served}:2", f"{served}-step-2")):
        for body in (BODY, {**BODY, "model": other}, {**BODY, "model": "Tiny"}):
            answer = await user.http.post(f"/e/{slug}/v1/chat/completions", json=body)
            assert answer.json()["model"] == name and gateway.requests[-1]["adapter_id"] == adapter_id


async def test_stream_has_its_usage_and_its_end(user: User, endpoint: dict[str, Any]) -> None:
    stream = await client_at(user, by_path()).chat.completions.create(
        model="", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello there"
    assert last.usage is not None and last.usage.total_tokens == 11 and chunks[0].model == "Tiny"


async def test_switched_target_answers_the_next_request(
    user: User, gateway: FakeGateway, endpoint: dict[str, Any]
) -> None:
    client = client_at(user, by_path())
    await client.chat.completions.create(model="", messages=MESSAGES)
    answer = await user.patch(f"/v1/endpoints/{endpoint['id']}", {"target": {"kind": "base_model", "baseModel": MODEL}})
    assert answer.status_code == 200
    assert (await client.chat.completions.create(model="", messages=MESSAGES)).model == MODEL
    assert [request["base_model"] for request in gateway.requests] == ["base/tiny", "base/model"]


@pytest.mark.parametrize("base_url", [by_path("nonesuch"), by_host("nonesuch"), by_path("-"), by_host("a.b")])
async def test_unknown_endpoint_is_not_found(user: User, endpoint: dict[str, Any], base_url: str) -> None:
    with pytest.raises(openai.NotFoundError):
        await client_at(user, base_url).chat.completions.create(model="", messages=MESSAGES)
    with pytest.raises(openai.NotFoundError):
        await client_at(user, base_url).models.list()


async def test_disabled_endpoint_answers_like_an_unknown_one(user: User, endpoint: dict[str, Any]) -> None:
    await user.patch(f"/v1/endpoints/{endpoint['id']}", {"enabled": False})
    disabled = await user.http.post("/e/triage/v1/chat/completions", json=BODY)
    unknown = await user.http.post("/e/unknown/v1/chat/completions", json=BODY)
    assert_openai_error(disabled, 404, "not_found")
    assert disabled.text.replace("triage", "unknown") == unknown.text


# Who may ask


async def test_key_opens_its_endpoint_by_either_header(user: User, publish: Callable[..., Any]) -> None:
    key = await create_key(user, await publish(authMode="fixed_api_key"))
    plaintext = key["plaintext"]
    assert await client_at(user, by_path(), plaintext).chat.completions.create(model="", messages=MESSAGES)
    for headers in ({"x-api-key": plaintext}, {"Authorization": "Bearer dummy", "X-API-Key": plaintext}):
        answer = await user.http.post("/e/triage/v1/chat/completions", json=BODY, headers=headers)
        assert answer.status_code == 200, answer.text


async def test_other_credentials_do_not_open_it(user: User, gateway: FakeGateway, publish: Callable[..., Any]) -> None:
    await publish(authMode="fixed_api_key")
    other = await create_key(user, await publish("other", authMode="fixed_api_key"))
    for key in (user.token, other["plaintext"], "ark_live_wrong", "Ä", " "):
        headers = {"x-api-key": key.encode()}
        for path in ("/e/triage/v1/models", "/e/triage/v1/chat/completions"):
            answer = await user.http.request("POST" if "chat" in path else "GET", path, headers=headers, json=BODY)
            assert_openai_error(answer, 401, "unauthorized", "authentication_error")
    for key in (user.token, other["plaintext"]):
        with pytest.raises(openai.AuthenticationError):
            await client_at(user, by_host(), key).chat.completions.create(model="", messages=MESSAGES)
    for headers in ({}, {"Authorization": "Basic dTpw"}, {"Authorization": ""}):
        answer = await user.http.post("/e/triage/v1/chat/completions", json=BODY, headers=headers)
        assert_openai_error(answer, 401, "unauthorized", "authentication_error")
    assert gateway.requests == []


async def test_revoked_key_is_refused_at_once(user: User, publish: Callable[..., Any]) -> None:
    endpoint = await publish(authMode="fixed_api_key")
    key = await create_key(user, endpoint)
    client = client_at(user, by_path(), key["plaintext"])
    await client.chat.completions.create(model="", messages=MESSAGES)
    assert (await user.delete(f"/v1/endpoints/{endpoint['id']}/keys/{key['id']}")).status_code == 204
    with pytest.raises(openai.AuthenticationError):
        await client.chat.completions.create(model="", messages=MESSAGES)


async def test_open_endpoint_ignores_credentials(user: User, endpoint: dict[str, Any]) -> None:
    for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic x"}, {"x-api-key": "nonsense"}):
        answer = await user.http.post("/e/triage/v1/chat/completions", json=BODY, headers=headers)
        assert answer.status_code == 200


async def test_key_opens_nothing_of_the_management(user: User, publish: Callable[..., Any]) -> None:
    key = await create_key(user, await publish(authMode="fixed_api_key"))
    user.token = key["plaintext"]
    for path in ("/v1/me", "/v1/models", "/v1/endpoints", "/v1/jobs"):
        assert (await user.get(path)).status_code == 401


# What a host reaches


@pytest.mark.parametrize(
    "path",
    ["/v1/me", "/v1/jobs", "/v1/endpoints", "/healthz", "/readyz", "/docs", "/openapi.json", "/", "//v1/me",
     "/../v1/me", "/%2e%2e/%2e%2e/v1/me", "/e/triage/v1/models", "/v1/models/Tiny", "/v1/auth/cli/config"],
)  # fmt: skip
@pytest.mark.parametrize("label", ["triage", "nonesuch", "www", "a.b", "x_y"])
async def test_host_of_an_endpoint_reaches_nothing_else(
    user: User, endpoint: dict[str, Any], path: str, label: str
) -> None:
    answer = await user.get(f"https://{label}.{DOMAIN}{path}")
    assert_openai_error(answer, 404, "not_found")


@pytest.mark.parametrize("host", ["127.0.0.1:8000", DOMAIN, f"api.{DOMAIN}", f"api.{DOMAIN}:8000"])
async def test_other_hosts_reach_the_management(user: User, host: str) -> None:
    assert (await user.get("/v1/me", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize("host", [f"evil{DOMAIN}", f"{DOMAIN}.evil.com"])
async def test_names_like_the_domain_reach_nothing(user: User, host: str) -> None:
    assert (await user.get("/v1/me", headers={"Host": host})).status_code == 403


async def test_body_too_large_for_a_host_has_openais_envelope(user: User, endpoint: dict[str, Any]) -> None:
    content = b" " * (user.app.state.services.settings.max_body_bytes + 1)
    answer = await user.http.post(f"{by_host()}/chat/completions", content=content)
    assert_openai_error(answer, 413, "payload_too_large")


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"n": 2}, "n"), ({"messages": []}, "messages"), ({"top_p": 7}, "top_p"), ({"temperature": []}, "temperature")],
)
async def test_bad_request_names_the_field(
    user: User, endpoint: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await client_at(user, by_path()).post("/chat/completions", body={**BODY, **fields}, cast_to=object)
    assert (raised.value.param, raised.value.code) == (param, "invalid_request")


@contextmanager
def statements(db: Database) -> Iterator[list[str]]:
    """What the database is asked for, but by the threads that no request waits for."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not threading.current_thread().name.startswith(("runs", "endpoint-changes", "last-used")):
            seen.append(statement)

    event.listen(db.engine, "before_cursor_execute", note)
    yield seen
    event.remove(db.engine, "before_cursor_execute", note)


async def test_request_after_the_first_reads_no_database(user: User, db: Database, publish: Callable[..., Any]) -> None:
    key = await create_key(user, await publish(authMode="fixed_api_key"))
    client = client_at(user, by_path(), key["plaintext"])
    with statements(db) as seen:
        await client.chat.completions.create(model="", messages=MESSAGES)
        assert seen, "the first one does"
        seen.clear()
        for _ in range(3):
            await client.chat.completions.create(model="", messages=MESSAGES)
        assert seen == []


# What is kept


async def test_answer_is_kept_as_a_run(user: User, publish: Callable[..., Any]) -> None:
    endpoint = await publish(authMode="fixed_api_key")
    key = await create_key(user, endpoint)
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    sent: Any = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    for stream in (False, True):
        answer = await client_at(user, by_path(), key["plaintext"]).chat.completions.create(
            model="", messages=sent, stream=stream
        )
        if stream:
            assert [chunk async for chunk in answer]
    second, first = await runs_of(user, endpoint)
    for run in (first, second):
        assert run["messages"] == [{"role": "system", "content": "be kind"}, *MESSAGES]
        assert run["answer"] == {"role": "assistant", "content": "Hello there"}
        assert run["usage"] == {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
        assert (run["endpointId"], run["keyId"], run["model"]) == (endpoint["id"], key["id"], "Tiny")
        assert (run["finishReason"], run["systemFingerprint"], run["tools"]) == ("stop", "fp-1", None)
        assert 0 <= run["firstTokenMs"] <= run["latencyMs"] and run["createdAt"].endswith("Z")
    assert first["createdAt"] <= second["createdAt"]


async def test_times_are_those_of_the_answer(user: User, gateway: FakeGateway, endpoint: dict[str, Any]) -> None:
    gateway.answer("Hello", " there", pause_s=0.03)
    await user.http.post("/e/triage/v1/chat/completions", json=BODY)
    [run] = await runs_of(user, endpoint)
    assert run["firstTokenMs"] >= 25 and run["latencyMs"] >= run["firstTokenMs"] + 25


async def test_nothing_is_kept_where_retention_is_disabled(user: User, publish: Callable[..., Any]) -> None:
    endpoint = await publish(runRetentionMode="disabled")
    assert (await user.http.post("/e/triage/v1/chat/completions", json=BODY)).status_code == 200
    assert await runs_of(user, endpoint) == []


async def test_answers_that_did_not_come_to_their_end_are_not_kept(
    user: User, gateway: FakeGateway, endpoint: dict[str, Any]
) -> None:
    for stream in (True, False):
        gateway.fail(ServiceUnavailableError("loading"))
        await user.http.post("/e/triage/v1/chat/completions", json={**BODY, "stream": stream})
        gateway.fail_after("Hel", error=ServiceUnavailableError("lost"))
        await user.http.post("/e/triage/v1/chat/completions", json={**BODY, "stream": stream})
    gateway.hang_after("Hel")
    left = await user.open("/e/triage/v1/chat/completions", "POST", body={**BODY, "stream": True})
    await left.frames(2)
    left.disconnect()
    await left.ended()
    assert gateway.running == 0 and await runs_of(user, endpoint) == []


async def test_chats_of_tokens_are_not_kept(user: User, endpoint: dict[str, Any]) -> None:
    await client_of(user).chat.completions.create(model="Tiny", messages=MESSAGES)
    assert await runs_of(user, endpoint) == []


async def test_answer_does_not_wait_for_a_database_that_blocks(
    user: User, endpoint: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked, release = threading.Event(), threading.Event()

    class BlockingDatabase:
        @contextmanager
        def write(self) -> Iterator[Session]:
            blocked.set()
            release.wait(20)
            with user.app.state.services.db.write() as session:
                yield session

    database: Any = BlockingDatabase()
    monkeypatch.setattr(user.app.state.services.runs, "_db", database)
    client = client_at(user, by_path())
    await client.chat.completions.create(model="", messages=MESSAGES)
    assert await asyncio.to_thread(blocked.wait, 20), "the store is at its first run"
    for _ in range(3):
        await client.chat.completions.create(model="", messages=MESSAGES)
    release.set()
    assert len(await runs_of(user, endpoint)) == 4


async def test_runs_come_in_pages(user: User, endpoint: dict[str, Any]) -> None:
    for _ in range(3):
        await user.http.post("/e/triage/v1/chat/completions", json=BODY)
    newest, middle, oldest = [run["id"] for run in await runs_of(user, endpoint)]
    path = f"/v1/endpoints/{endpoint['id']}/runs"
    page = (await user.get(path, params={"limit": 1, "before": newest})).json()["runs"]
    assert [run["id"] for run in page] == [middle]
    assert (await user.get(path, params={"before": oldest})).json() == {"runs": []}
    answer = await user.get(path, params={"before": "nonesuch"})
    assert answer.status_code == 404 and answer.json()["param"] == "before"
    for limit in ("0", "201", "many"):
        answer = await user.get(path, params={"limit": limit})
        assert answer.status_code == 400 and answer.json()["param"] == "limit"


async def test_export_is_a_data_set_as_it_is(user: User, gateway: FakeGateway, endpoint: dict[str, Any]) -> None:
    for question in ("ein ü", "two\nlines\u2028and more"):
        messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": question}]
        await user.http.post("/e/triage/v1/chat/completions", json={"messages": messages})
    await runs_of(user, endpoint)
    answer = await user.get(f"/v1/endpoints/{endpoint['id']}/runs/export")
    assert answer.headers["content-type"] == "application/jsonl" and "ein ü" in answer.text
    conversations = [parse_row(row, "chatml") for row in parse_rows(answer.content)]
    assert [each.messages for each in conversations if isinstance(each, Conversation)] == [
        [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "Hello there"},
        ]
        for question in ("ein ü", "two\nlines\u2028and more")
    ]


TOOLS: Any = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"q":1}'}}


async def test_calls_of_tools_are_answered_kept_and_exported(
    user: User, gateway: FakeGateway, endpoint: dict[str, Any]
) -> None:
    begin = {"type": "tool_call_delta", "index": 0, "id": "call_1", "name": "look_up", "arguments": '{"q"'}
    gateway.answer(begin, {"type": "tool_call_delta", "index": 0, "arguments": ":1}"}, finish_reason="tool_calls")
    client = client_at(user, by_path())
    whole = await client.chat.completions.create(model="", messages=MESSAGES, tools=TOOLS)
    [call] = whole.choices[0].message.tool_calls or []
    assert call.model_dump(exclude_none=True) == CALL and whole.choices[0].finish_reason == "tool_calls"
    stream = await client.chat.completions.create(model="", messages=MESSAGES, tools=TOOLS, stream=True)
    deltas = [chunk.choices[0].delta.tool_calls for chunk in [chunk async for chunk in stream]]
    pieces = [delta[0].function for delta in deltas if delta]
    assert "".join(piece.arguments or "" for piece in pieces if piece) == '{"q":1}'
    for run in await runs_of(user, endpoint):
        assert run["answer"] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
        assert run["tools"] == TOOLS and run["finishReason"] == "tool_calls" and run["firstTokenMs"] is not None
    answer = await user.get(f"/v1/endpoints/{endpoint['id']}/runs/export")
    for row in parse_rows(answer.content):
        conversation = parse_row(row, "chatml")
        assert isinstance(conversation, Conversation)
        assert conversation.tools == TOOLS and conversation.messages[-1]["tool_calls"] == [CALL]


async def test_refusal_of_the_replica_names_the_field_as_it_was_sent(
    user: User, gateway: FakeGateway, endpoint: dict[str, Any]
) -> None:
    gateway.fail(InvalidRequestError("structuredOutputs.regex: is too large", param="structuredOutputs.regex"))
    with pytest.raises(openai.BadRequestError, match="guided_regex: is too large") as raised:
        await client_at(user, by_path()).chat.completions.create(
            model="", messages=MESSAGES, extra_body={"guided_regex": "a"}
        )
    assert raised.value.param == "guided_regex"


async def test_runs_of_another_users_endpoint_are_not_found(
    login: Callable[[], Any], user: User, endpoint: dict[str, Any]
) -> None:
    stranger: User = await login()
    for path in (f"/v1/endpoints/{endpoint['id']}/runs", f"/v1/endpoints/{endpoint['id']}/runs/export"):
        assert (await stranger.get(path)).status_code == 404
        assert (await user.http.get(path, params=user.scope)).status_code == 401


async def test_end_of_the_process_writes_what_is_kept(
    app: FastAPI, http: httpx.AsyncClient, user: User, endpoint: dict[str, Any]
) -> None:
    await http.post("/e/triage/v1/chat/completions", json=BODY)
    async with app.router.lifespan_context(app):
        pass
    answer = await user.get(f"/v1/endpoints/{endpoint['id']}/runs")
    assert len(answer.json()["runs"]) == 1
