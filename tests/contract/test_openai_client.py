"""OpenAI's own client, sync and async, on the management side and on published endpoints, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import openai
import pytest

from tests.contract.conftest import ANSWER, DOMAIN, QUESTION, SAVE_EVERY, STEPS, Recorded
from tests.contract.wire import MODEL, UNKNOWN_ID, Caller
from tests.servers.arkor import RunningService

pytestmark = pytest.mark.integration

MESSAGES: Any = [{"role": "user", "content": QUESTION}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "book", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "wait"}},
]
WAYS = ["management", "path", "host"]
LONG = 900


@pytest.fixture(scope="module")
def key(caller: Caller, finished: Recorded) -> tuple[str, str]:
    """The slug of an endpoint of the final adapter, and the key that opens it."""
    made = caller.create_endpoint({"kind": "adapter", "adapter": finished.final}, authMode="fixed_api_key")
    issued = caller.post(f"/v1/endpoints/{made['id']}/keys", {"label": "openai"}).json()["key"]
    return made["slug"], issued["plaintext"]


@pytest.fixture(scope="module")
def options(service: RunningService, caller: Caller, key: tuple[str, str]) -> Callable[[str], dict[str, Any]]:
    """By way, what OpenAI's clients are made with."""

    def options(way: str) -> dict[str, Any]:
        slug, plaintext = key
        url = f"{service.url}/e/{slug}/v1" if way == "path" else f"{service.url}/v1"
        headers = {"Host": f"{slug}.{DOMAIN}"} if way == "host" else {}
        given = {"base_url": url, "api_key": caller.token if way == "management" else plaintext}
        return {**given, "default_headers": headers, "max_retries": 0, "timeout": 120}

    return options


@pytest.fixture(params=WAYS)
def client(request: pytest.FixtureRequest, options: Callable[[str], dict[str, Any]]) -> Any:
    with openai.OpenAI(**options(request.param)) as made:
        yield made


@pytest.fixture
def management(options: Callable[[str], dict[str, Any]]) -> Any:
    with openai.OpenAI(**options("management")) as made:
        yield made


def create(client: Any, finished: Recorded, **fields: Any) -> Any:
    """A greedy answer of the final adapter."""
    given = {"model": finished.id, "messages": MESSAGES, "temperature": 0, "max_tokens": 32}
    return client.chat.completions.create(**{**given, **fields})


def test_whole_answer(client: openai.OpenAI, finished: Recorded) -> None:
    answer = create(client, finished)
    assert answer.choices[0].message.content == ANSWER and answer.choices[0].finish_reason == "stop"
    assert answer.model == finished.id and answer.system_fingerprint.startswith(f"{finished.id}-final@")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_answer_with_usage(client: openai.OpenAI, finished: Recorded) -> None:
    *found, last = create(client, finished, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in found) == ANSWER
    assert found[-1].choices[0].finish_reason == "stop" and all(chunk.usage is None for chunk in found)
    assert last.choices == [] and last.usage == create(client, finished).usage


def test_strict_json_schema(client: openai.OpenAI, finished: Recorded) -> None:
    answer = create(client, finished, response_format=FORMAT, max_tokens=LONG)
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
    streamed = create(client, finished, response_format=FORMAT, max_tokens=LONG, stream=True)
    jsonschema.validate(json.loads("".join(c.choices[0].delta.content or "" for c in streamed)), SCHEMA)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book"}}])
def test_forced_tool_call(client: openai.OpenAI, finished: Recorded, choice: Any) -> None:
    answer = create(client, finished, tools=TOOLS, tool_choice=choice, max_tokens=LONG)
    [call] = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    assert call.function.name in ("book", "wait") and (choice == "required" or call.function.name == "book")
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA if call.function.name == "book" else {})


def test_streamed_tool_call(client: openai.OpenAI, finished: Recorded) -> None:
    choice = {"type": "function", "function": {"name": "book"}}
    streamed = list(create(client, finished, tools=TOOLS, tool_choice=choice, max_tokens=LONG, stream=True))
    pieces = [piece for chunk in streamed for piece in chunk.choices[0].delta.tool_calls or []]
    assert pieces[0].id and pieces[0].function.name == "book"
    jsonschema.validate(json.loads("".join(piece.function.arguments or "" for piece in pieces)), SCHEMA)
    assert streamed[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("way", WAYS)
def test_async_client_streams_many_answers_at_once(
    options: Callable[[str], dict[str, Any]], finished: Recorded, way: str
) -> None:
    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(
            model=finished.id, messages=MESSAGES, temperature=0, max_tokens=32, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_many() -> list[str]:
        async with openai.AsyncOpenAI(**options(way)) as client:
            return await asyncio.gather(*(ask(client) for _ in range(8)))

    assert asyncio.run(ask_many()) == [ANSWER] * 8


@pytest.mark.parametrize("name", ["tiny", MODEL, "JOB", f"JOB:{SAVE_EVERY}", f"JOB:{STEPS}"])
def test_management_side_answers_by_every_name(management: openai.OpenAI, finished: Recorded, name: str) -> None:
    name = name.replace("JOB", finished.id)
    answer = create(management, finished, model=name)
    assert answer.model == name
    if finished.id in name:
        suffix = f"step-{name.partition(':')[2]}" if ":" in name else "final"
        assert (answer.system_fingerprint or "").startswith(f"{finished.id}-{suffix}@")
    else:
        assert (answer.system_fingerprint or "").startswith("base@")
    assert management.models.retrieve(name).id == name


def test_models_of_the_management_side(management: openai.OpenAI, finished: Recorded) -> None:
    names = [model.id for model in management.models.list()]
    saved = [f"{finished.id}:{step}" for step in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)]
    assert {MODEL, "tiny", finished.id, *saved} <= set(names)


@pytest.mark.parametrize("way", ["path", "host"])
def test_endpoint_lists_the_one_model_it_is(
    options: Callable[[str], dict[str, Any]], finished: Recorded, key: tuple[str, str], way: str
) -> None:
    with openai.OpenAI(**options(way)) as client:
        [model] = client.models.list().data
        assert (model.id, model.owned_by) == (finished.id, key[0])
        assert create(client, finished, model="gpt-5").model == finished.id, "the target decides, not the body"


# Errors


@pytest.mark.parametrize("way", WAYS)
def test_wrong_key(options: Callable[[str], dict[str, Any]], finished: Recorded, way: str) -> None:
    with openai.OpenAI(**{**options(way), "api_key": "ark_live_wrong"}) as client:
        with pytest.raises(openai.AuthenticationError):
            create(client, finished)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.mark.parametrize("name", ["gpt-5", UNKNOWN_ID, f"{UNKNOWN_ID}:5", "JOB:7"])
def test_unknown_model(management: openai.OpenAI, finished: Recorded, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        create(management, finished, model=name.replace("JOB", finished.id))
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_unknown_endpoint(service: RunningService, finished: Recorded) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/e/nonesuch/v1", api_key="x", max_retries=0)
    with client, pytest.raises(openai.NotFoundError):
        create(client, finished)


def test_final_adapter_that_is_not_there_yet(management: openai.OpenAI, finished: Recorded, caller: Caller) -> None:
    config = {"model": MODEL, "datasetSource": {"type": "huggingface", "name": "arkorlab/triage-demo"}}
    job_id = caller.post("/v1/jobs", {"name": "x", "config": config}).json()["job"]["id"]
    try:
        with pytest.raises(openai.ConflictError):
            create(management, finished, model=job_id)
    finally:
        caller.post(f"/v1/jobs/{job_id}/cancel")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"temperature": 9}, "temperature"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS}, "tools"),  # the model shows no form of calls, so it cannot be left to choose
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)  # fmt: skip
def test_bad_request(client: openai.OpenAI, finished: Recorded, fields: Any, param: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        create(client, finished, stream=stream, **fields)
    assert (raised.value.param or "").startswith(param) and param in raised.value.message
