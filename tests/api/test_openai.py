"""OpenAI's API for the owner of a token, asked by OpenAI's own client."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import openai
import pytest

from arkor_ray.api import model_names, sse
from arkor_ray.db.session import Database
from arkor_ray.db.tables import CheckpointRow
from arkor_ray.errors import InvalidRequestError, ServiceUnavailableError
from tests.api.conftest import MODEL, FakeGateway, Training, User
from tests.api.openai_client import assert_openai_error, client_of

pytestmark = pytest.mark.anyio

MESSAGES: Any = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


@pytest.fixture
def client(user: User) -> openai.AsyncOpenAI:
    return client_of(user)


@pytest.fixture
async def job_id(user: User, training: Training) -> str:
    """A completed job with one checkpoint, at step 2."""
    made = await user.create_job()
    training.start(made)
    training.save(made, 2)
    training.complete(made)
    return made


async def test_base_model_answers_by_its_name_in_any_case(client: openai.AsyncOpenAI, gateway: FakeGateway) -> None:
    answer = await client.chat.completions.create(model="TINY", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello there" and answer.choices[0].finish_reason == "stop"
    assert answer.model == "TINY" and answer.object == "chat.completion" and answer.system_fingerprint == "fp-1"
    assert answer.usage is not None and answer.usage.total_tokens == 11
    [request] = gateway.requests
    assert (request["base_model"], request["base_precision"], request["adapter_id"]) == ("base/tiny", None, None)


async def test_answer_has_only_what_openai_gives(user: User) -> None:
    answer = (await user.post(CHAT, {"model": "Tiny", "messages": MESSAGES})).json()
    assert set(answer) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}


async def test_job_answers_as_its_final_adapter_and_with_a_step_as_that_checkpoint(
    client: openai.AsyncOpenAI, gateway: FakeGateway, job_id: str
) -> None:
    for name, adapter_id in ((job_id, f"{job_id}-final"), (f"{job_id}:2", f"{job_id}-step-2")):
        answer = await client.chat.completions.create(model=name, messages=MESSAGES)
        assert answer.model == name and gateway.requests[-1]["adapter_id"] == adapter_id
        assert (gateway.requests[-1]["base_model"], gateway.requests[-1]["base_precision"]) == ("base/model", "fp32")


async def test_stream_is_chunks_with_the_usage_last(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="Tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Hello", " there", None]
    assert chunks[-1].choices[0].finish_reason == "stop" and all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage is not None and last.usage.total_tokens == 11


async def test_silence_in_a_stream_is_filled_with_what_the_client_overlooks(
    user: User, client: openai.AsyncOpenAI, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.005)
    gateway.answer("Hello", pause_s=0.1)
    answer = await user.post(CHAT, {"model": "Tiny", "messages": MESSAGES, "stream": True})
    assert b": ping\n\n" in answer.content and b"event:" not in answer.content
    stream = await client.chat.completions.create(model="Tiny", messages=MESSAGES, stream=True)
    assert [chunk.choices[0].delta.content async for chunk in stream] == ["", "Hello", None]


async def test_failure_in_mid_stream_is_raised_by_the_client(client: openai.AsyncOpenAI, gateway: FakeGateway) -> None:
    gateway.fail_after("Hel", error=ServiceUnavailableError("The replica was lost"))
    stream = await client.chat.completions.create(model="Tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="The replica was lost"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("name", ["gpt-5", "", "/etc", "no/such", "a:b", "job:", "x" * 200, "ü"])
async def test_unknown_model_is_not_found(client: openai.AsyncOpenAI, gateway: FakeGateway, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        await client.chat.completions.create(model=name, messages=MESSAGES)
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    assert gateway.requests == []


async def test_foreign_job_answers_like_a_missing_one(
    login: Callable[[], Any], gateway: FakeGateway, job_id: str
) -> None:
    stranger: User = await login()
    missing = "00000000-0000-4000-8000-000000000000"
    for suffix in ("", ":2", ":3"):
        answers = []
        for each in (job_id, missing):
            name = each + suffix
            for answer in (
                await stranger.post(CHAT, {"model": name, "messages": MESSAGES}),
                await stranger.get(f"/v1/models/{name}"),
            ):
                assert_openai_error(answer, 404, "model_not_found")
                answers.append(answer.text.replace(each, "ID"))
        assert len(set(answers)) == 1
    assert gateway.requests == []


async def test_missing_checkpoint_of_my_job_is_not_found_and_names_those_there_are(
    client: openai.AsyncOpenAI, gateway: FakeGateway, job_id: str
) -> None:
    for step in (3, 4, 10**17):
        with pytest.raises(openai.NotFoundError, match="steps 2") as raised:
            await client.chat.completions.create(model=f"{job_id}:{step}", messages=MESSAGES)
        assert raised.value.code == "model_not_found"
    assert gateway.requests == []


async def test_final_adapter_of_an_unfinished_job_is_a_conflict(user: User, client: openai.AsyncOpenAI) -> None:
    job_id = await user.create_job()
    with pytest.raises(openai.ConflictError, match="does not exist yet") as raised:
        await client.chat.completions.create(model=job_id, messages=MESSAGES)
    assert raised.value.param == "model"


async def test_wrong_token_is_an_authentication_error(user: User) -> None:
    for token in ("arkt_wrong", "ark_live_wrong"):
        with pytest.raises(openai.AuthenticationError):
            await client_of(user, api_key=token).chat.completions.create(model="Tiny", messages=MESSAGES)
        with pytest.raises(openai.AuthenticationError):
            await client_of(user, api_key=token).models.list()
    answer = await user.http.post(CHAT, json={"model": "Tiny", "messages": MESSAGES}, headers={"x-api-key": user.token})
    assert_openai_error(answer, 401, "unauthorized", "authentication_error")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"functions": [{}]}, "functions"),
    ],
)
async def test_bad_request_names_the_field(
    client: openai.AsyncOpenAI, gateway: FakeGateway, fields: dict[str, Any], param: str
) -> None:
    sent = {"model": "Tiny", "messages": MESSAGES, **fields}
    with pytest.raises(openai.BadRequestError) as raised:
        await client.post("/chat/completions", body=sent, cast_to=object)
    assert (raised.value.param or "").startswith(param) and param in raised.value.message
    assert gateway.requests == []


async def test_every_error_has_openais_envelope(user: User, gateway: FakeGateway) -> None:
    def post(content: bytes) -> Any:
        return user.call("POST", CHAT, content=content, headers={"Content-Type": "application/json"})

    assert_openai_error(await post(b"{"), 400, "invalid_request")
    assert_openai_error(await post(b"[]"), 400, "invalid_request")
    assert_openai_error(await post(b'{"messages": [NaN]}'), 400, "invalid_request")
    limit = user.app.state.services.settings.max_body_bytes
    assert_openai_error(await post(b" " * (limit + 1)), 413, "payload_too_large")
    assert_openai_error(await user.get(CHAT), 405, "method_not_allowed")
    body = {"model": "Tiny", "messages": MESSAGES}
    gateway.fail(InvalidRequestError("The prompt is longer than the model's context", param="messages"))
    assert assert_openai_error(await user.post(CHAT, body), 400, "invalid_request")["param"] == "messages"
    gateway.fail(RuntimeError("secret"))
    answer = await user.post(CHAT, body)
    assert_openai_error(answer, 500, "internal_error", "server_error")
    assert "secret" not in answer.text
    gateway.fail(ServiceUnavailableError("The model is loading", retry_after=5))
    answer = await user.post(CHAT, body)
    assert_openai_error(answer, 503, "unavailable", "server_error")
    assert answer.headers["retry-after"] == "5"


async def test_other_routes_keep_the_contracts_envelope(user: User) -> None:
    for path in ("/v1/jobs/none", "/v1/nothing"):
        assert isinstance((await user.get(path)).json()["error"], str)


async def test_list_has_the_base_models_and_my_adapters(
    client: openai.AsyncOpenAI, job_id: str, user: User, login: Callable[[], Any], training: Training
) -> None:
    stranger: User = await login()
    training.complete(await stranger.create_job())
    listed = (await client.models.list()).data
    assert [model.id for model in listed] == [MODEL, "Tiny", job_id, f"{job_id}:2"]
    assert [model.owned_by for model in listed] == ["arkor-ray", "arkor-ray", user.org_slug, user.org_slug]
    assert all(model.object == "model" for model in listed) and listed[2].created > 1_700_000_000
    for model in listed:
        assert await client.models.retrieve(model.id) == model


async def test_list_still_has_the_names_that_jobs_may_use(user: User, job_id: str) -> None:
    answer = await user.get("/v1/models")
    assert answer.json()["models"] == [{"name": MODEL}, {"name": "Tiny"}] and answer.json()["object"] == "list"
    assert (await user.http.get("/v1/models")).status_code == 401


async def test_list_is_bounded_and_what_it_leaves_out_still_answers(
    client: openai.AsyncOpenAI, user: User, training: Training, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_names, "LISTED_ADAPTERS", 2)
    job_id = await user.create_job()
    for step in (1, 2, 3):
        training.save(job_id, step)
    with db.write() as session:  # the steps in another order than their times
        session.get_one(CheckpointRow, f"{job_id}-step-2").created_at -= timedelta(hours=1)
    names = [model.id for model in (await client.models.list()).data]
    assert names[2:] == [f"{job_id}:3", f"{job_id}:1"]
    assert (await client.models.retrieve(f"{job_id}:2")).id == f"{job_id}:2"
    assert (await client.chat.completions.create(model=f"{job_id}:2", messages=MESSAGES)).model == f"{job_id}:2"
