"""Inference over HTTP: who answers, in which shape, and what happens when it goes wrong."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from arkor_ray.api import chat_answer
from arkor_ray.client.inference import TextReader, text_of
from arkor_ray.errors import ArkorError, InvalidRequestError, NotFoundError, ServiceUnavailableError
from tests.api.conftest import MODEL, FakeGateway, Training, User

pytestmark = pytest.mark.anyio

PATH = "/v1/inference/chat"
MESSAGES = [{"role": "user", "content": "hi"}]


def base(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "baseModel": "Tiny", "stream": False, **fields}


def adapter(job_id: str, step: int | None = None, **fields: Any) -> dict[str, Any]:
    named = (
        {"kind": "final", "jobId": job_id} if step is None else {"kind": "checkpoint", "jobId": job_id, "step": step}
    )
    return {"messages": MESSAGES, "adapter": named, "stream": False, **fields}


def data_of(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    frames = text.removesuffix("\n\n").split("\n\n")
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames), "bare data frames only"
    return [json.loads(frame[6:]) if frame != "data: [DONE]" else "[DONE]" for frame in frames]


async def test_whole_answer_has_the_text_in_both_places(user: User) -> None:
    body = (await user.post(PATH, base())).json()
    assert body["content"] == body["choices"][0]["message"]["content"] == "Hello there"
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hello there"}, "finish_reason": "stop"}
    ]
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["model"] == "Tiny" and body["system_fingerprint"] == "fp-1" and isinstance(body["created"], int)
    assert body["usage"] == {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}


async def test_answer_cut_at_the_token_limit_says_so(user: User, gateway: FakeGateway) -> None:
    gateway.answer("Hel", finish_reason="length")
    assert (await user.post(PATH, base())).json()["choices"][0]["finish_reason"] == "length"


async def test_streamed_answer_is_openai_chunks_until_done(user: User) -> None:
    answer = await user.post(PATH, base(stream=True))
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = data_of(answer.text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": " there"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk" and chunk["model"] == "Tiny"
        assert chunk["id"] == chunks[0]["id"] and chunk["system_fingerprint"] == "fp-1" and "usage" not in chunk


async def test_answer_is_streamed_unless_told_otherwise(user: User) -> None:
    body = base()
    del body["stream"]
    assert (await user.post(PATH, body)).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("spelling", ["includeUsage", "include_usage"])
async def test_usage_comes_last_when_asked_for(user: User, spelling: str) -> None:
    *chunks, usage, done = data_of((await user.post(PATH, base(stream=True, streamOptions={spelling: True}))).text)
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 11 and done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_sdk_reads_the_text_of_both_forms(user: User) -> None:
    assert text_of(await user.post(PATH, base())) == "Hello there"
    reader = TextReader()
    assert list(reader.feed((await user.post(PATH, base(stream=True))).content)) == ["Hello", " there"]
    assert reader.done


async def test_base_model_is_resolved_and_its_requested_name_echoed(user: User, gateway: FakeGateway) -> None:
    assert (await user.post(PATH, base(baseModel="TINY"))).json()["model"] == "TINY"
    [request] = gateway.requests
    assert (request["base_model"], request["base_precision"], request["adapter_id"]) == ("base/tiny", None, None)


async def test_unknown_base_model_is_400_and_lists_the_accepted_names(user: User) -> None:
    answer = await user.post(PATH, base(baseModel="gpt-5"))
    assert answer.status_code == 400 and answer.json()["param"] == "baseModel" and "Tiny" in answer.json()["error"]


async def test_checkpoint_answers_by_its_step_while_the_job_runs(
    user: User, training: Training, gateway: FakeGateway
) -> None:
    job_id = await user.create_job()
    training.start(job_id)
    for step in (2, 4):
        training.save(job_id, step)
    body = (await user.post(PATH, adapter(job_id, 4))).json()
    assert body["model"] == MODEL
    [request] = gateway.requests
    assert (request["base_model"], request["base_precision"]) == ("base/model", "fp32")
    assert request["adapter_id"] == f"{job_id}-step-4"


async def test_final_adapter_answers_once_the_job_is_completed(
    user: User, training: Training, gateway: FakeGateway
) -> None:
    job_id = await user.create_job()
    training.complete(job_id, step=4)
    assert (await user.post(PATH, adapter(job_id))).status_code == 200
    assert gateway.requests[0]["adapter_id"] == f"{job_id}-final"
    answer = await user.post(PATH, adapter(job_id, 4))
    assert answer.status_code == 404, "the final adapter is no checkpoint of its step"


async def test_final_adapter_of_an_unfinished_job_is_409(user: User, training: Training) -> None:
    job_id = await user.create_job()
    assert "queued" in (await user.post(PATH, adapter(job_id))).json()["error"]
    training.start(job_id)
    training.save(job_id, 2)
    answer = await user.post(PATH, adapter(job_id))
    assert answer.status_code == 409 and answer.json()["code"] == "conflict"
    assert "running" in answer.json()["error"] and "steps 2" in answer.json()["error"]


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_final_adapter_of_a_job_that_ended_early_is_404_naming_the_checkpoints(
    user: User, training: Training, end: str
) -> None:
    job_id = await user.create_job()
    training.start(job_id)
    for step in (2, 4):
        training.save(job_id, step)
    if end == "failed":
        training.fail(job_id)
    else:
        await user.post(f"/v1/jobs/{job_id}/cancel")
    answer = await user.post(PATH, adapter(job_id))
    assert answer.status_code == 404 and end in answer.json()["error"] and "steps 2, 4" in answer.json()["error"]
    assert (await user.post(PATH, adapter(job_id, 4))).status_code == 200, "its checkpoints answer on"


@pytest.mark.parametrize("step", [3, 10**8, 10**30])
async def test_unknown_step_is_404_naming_the_checkpoints(user: User, training: Training, step: int) -> None:
    job_id = await user.create_job()
    training.save(job_id, 2)
    answer = await user.post(PATH, adapter(job_id, step))
    assert answer.status_code == 404 and "steps 2" in answer.json()["error"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"baseModel": None}, "adapter"),
        ({"adapter": {"kind": "final", "jobId": "x"}}, "adapter"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"temperature": -1}, "temperature"),
        ({"topP": 0}, "topP"),
        ({"maxTokens": 0}, "maxTokens"),
        ({"topLogprobs": 3}, "topLogprobs"),
        ({"stop": [""]}, "stop"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools.0.function.name"),
        ({"toolChoice": "required"}, "toolChoice"),
        ({"responseFormat": {"type": "yaml"}}, "responseFormat.type"),
        ({"responseFormat": {"type": "json_object"}, "structuredOutputs": {"regex": "a"}}, "structuredOutputs"),
        ({"structuredOutputs": {"regex": "a+", "choice": ["a"]}}, "structuredOutputs"),
        ({"structuredOutputs": {"json": {"type": "strin"}}}, "structuredOutputs.json.type"),
        ({"stop": ["x"] * 10_000}, "stop"),
    ],
)
async def test_request_that_cannot_be_served_as_asked_is_400(
    user: User, gateway: FakeGateway, fields: dict[str, Any], param: str
) -> None:
    answer = await user.post(PATH, base(**fields))
    assert answer.status_code == 400, answer.text
    assert answer.json()["param"] == param
    assert gateway.requests == [], "never generated as if it had not been asked"


async def test_constraint_reaches_the_replica(user: User, gateway: FakeGateway) -> None:
    schema = {
        "type": "object",
        "properties": {"aB": {"type": "string"}},
        "required": ["aB"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert (await user.post(PATH, base(responseFormat=asked))).status_code == 200
    assert gateway.requests[0]["constraint"] == {
        "kind": "json", "schema": schema, "whitespace": None, "field": "responseFormat.json_schema.schema",
    }  # fmt: skip


async def test_schema_that_is_not_strict_has_its_own_code(user: User) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "object"}}}
    answer = await user.post(PATH, base(responseFormat=asked))
    assert answer.status_code == 400 and answer.json()["code"] == "invalid_schema"
    assert answer.json()["error"].startswith("invalid_schema: responseFormat.json_schema.schema: ")


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def call(index: int, arguments: str, **first: str) -> dict[str, Any]:
    return {"type": "tool_call_delta", "index": index, "arguments": arguments, **first}


async def test_tools_reach_the_replica_and_what_it_refuses_the_user(user: User, gateway: FakeGateway) -> None:
    gateway.fail(InvalidRequestError("tools: no form", code="tool_calling_not_configured", param="tools"))
    answer = await user.post(PATH, base(tools=[TOOL]))
    assert answer.status_code == 400 and answer.json()["code"] == "tool_calling_not_configured"
    assert answer.json()["error"].startswith("tool_calling_not_configured: ")
    assert gateway.requests[0]["tools"] == [TOOL] and gateway.requests[0]["constraint"] is None
    gateway.answer("x")
    await user.post(PATH, base(tools=[TOOL], toolChoice={"type": "function", "function": {"name": "f"}}))
    assert gateway.requests[1]["constraint"]["kind"] == "tool_call"


async def test_calls_of_tools_are_in_the_message(user: User, gateway: FakeGateway) -> None:
    gateway.answer(
        call(0, "", id="aaa", name="f"), call(0, '{"a":'), call(0, "1}"), call(1, "{}", id="bbb", name="g"),
        finish_reason="tool_calls",
    )  # fmt: skip
    body = (await user.post(PATH, base(tools=[TOOL]))).json()
    assert body["choices"][0] == {
        "index": 0,
        "finish_reason": "tool_calls",
        "message": {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "aaa", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
                {"id": "bbb", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
    }
    assert body["content"] is None


async def test_text_beside_a_call_is_content(user: User, gateway: FakeGateway) -> None:
    gateway.answer("Wait.", call(0, "{}", id="aaa", name="f"), finish_reason="tool_calls")
    body = (await user.post(PATH, base(tools=[TOOL]))).json()
    assert body["content"] == body["choices"][0]["message"]["content"] == "Wait."


async def test_calls_of_tools_are_streamed_as_openais_deltas(user: User, gateway: FakeGateway) -> None:
    gateway.answer(call(0, "", id="aaa", name="f"), call(0, "{}"), finish_reason="tool_calls")
    answer = await user.post(PATH, base(tools=[TOOL], stream=True))
    *chunks, done = data_of(answer.text)
    assert done == "[DONE]" and chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert [chunk["choices"][0]["delta"].get("tool_calls") for chunk in chunks] == [
        None,
        [{"index": 0, "id": "aaa", "type": "function", "function": {"name": "f", "arguments": ""}}],
        [{"index": 0, "function": {"arguments": "{}"}}],
        None,
    ]
    reader = TextReader()
    assert list(reader.feed(answer.content)) == [] and reader.done


async def test_messages_may_be_empty_and_have_unknown_keys(user: User, gateway: FakeGateway) -> None:
    messages = [
        {"role": "system", "content": "", "id": 1},
        {"role": "user", "content": "hi", "id": 2},
        {"role": "assistant", "content": "", "id": 3},
        {"role": "user", "content": "again", "id": 4},
    ]
    sent = base(
        messages=messages, temperature=0, topP=0.5, maxTokens=7, stop="END", seed=3, responseFormat={"type": "text"},
        presencePenalty=0.1, logitBias={}, enableThinking=False, reasoningEffort="low",
    )  # fmt: skip
    assert (await user.post(PATH, sent)).status_code == 200
    [request] = gateway.requests
    assert request["messages"] == [{"role": m["role"], "content": m["content"]} for m in messages]
    assert (request["temperature"], request["top_p"], request["max_tokens"]) == (0, 0.5, 7)
    assert (request["stop"], request["seed"]) == (["END"], 3)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("The prompt is longer than the model's context"), 400),
        (NotFoundError("No such adapter"), 404),
        (ServiceUnavailableError("The model is loading", retry_after=5), 503),
        (RuntimeError("secret"), 500),
    ],
)
async def test_error_before_the_first_token_is_a_status(
    user: User, gateway: FakeGateway, error: Exception, status: int, stream: bool
) -> None:
    gateway.fail(error)
    answer = await user.post(PATH, base(stream=stream))
    assert answer.status_code == status and answer.json()["error"].startswith(answer.json()["code"])
    assert "secret" not in answer.text and gateway.running == 0


@pytest.mark.parametrize(
    ("error", "shown"),
    [(ServiceUnavailableError("The replica was lost"), "The replica was lost"), (RuntimeError("secret"), "fault")],
)
async def test_error_after_the_first_token_is_in_the_stream_and_nothing_is_done(
    user: User, gateway: FakeGateway, error: Exception, shown: str
) -> None:
    gateway.fail_after("Hel", error=error)
    answer = await user.post(PATH, base(stream=True))
    *chunks, last = data_of(answer.text)
    assert chunks[-1]["choices"][0]["delta"] == {"content": "Hel"}
    assert shown in last["error"]["message"] and "secret" not in answer.text
    reader = TextReader()
    with pytest.raises(ArkorError):
        list(reader.feed(answer.content))
    assert not reader.done


async def test_error_in_the_middle_of_a_whole_answer_is_a_status(user: User, gateway: FakeGateway) -> None:
    gateway.fail_after("Hel", error=ServiceUnavailableError("The replica was lost"))
    assert (await user.post(PATH, base())).status_code == 503


@pytest.mark.parametrize("stream", [True, False])
async def test_answer_that_just_stops_is_no_success(user: User, gateway: FakeGateway, stream: bool) -> None:
    gateway.stop_after("Hel")
    answer = await user.post(PATH, base(stream=stream))
    if stream:
        assert "error" in data_of(answer.text)[-1]
    else:
        assert answer.status_code == 500


@pytest.mark.parametrize("stream", [True, False])
async def test_model_that_does_not_begin_is_given_up_before_the_client_does(
    user: User, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    assert chat_answer.START_LIMIT_S < 300
    monkeypatch.setattr(chat_answer, "START_LIMIT_S", 0.02)
    gateway.hang()
    answer = await user.post(PATH, base(stream=stream))
    assert answer.status_code == 503 and "retry-after" in answer.headers and gateway.running == 0


async def test_headers_wait_for_the_models_admission(user: User, gateway: FakeGateway) -> None:
    gateway.hang()
    stream = await user.open(PATH, "POST", body=base(stream=True), wait=False)
    while not gateway.running:
        await asyncio.sleep(0.005)
    assert stream.status == 0
    stream.disconnect()
    await stream.ended()
    assert gateway.running == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_leaves_cancels_its_generation(user: User, gateway: FakeGateway, stream: bool) -> None:
    gateway.hang_after("Hel")
    request = await user.open(PATH, "POST", body=base(stream=stream), wait=stream)
    if stream:
        assert [json.loads(frame.data)["choices"][0]["delta"].get("content") for frame in await request.frames(2)] == [
            "",
            "Hel",
        ]
    while not gateway.running:
        await asyncio.sleep(0.005)
    request.disconnect()
    await request.ended()
    assert gateway.running == 0


async def test_each_call_is_a_new_generation(user: User, gateway: FakeGateway) -> None:
    first = (await user.post(PATH, base())).json()
    gateway.answer("Something else")
    second: httpx.Response = await user.post(PATH, base())
    assert second.json()["content"] == "Something else" and second.json()["id"] != first["id"]
