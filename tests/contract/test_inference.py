"""Inference on the wire: who answers, in which shape, under which constraint, and what is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from tests.contract.conftest import ANSWER, QUESTION, SAVE_EVERY, STEPS, Recorded
from tests.contract.wire import MODEL, UNKNOWN_ID, Caller, assert_error, chunks, frames, text_of

pytestmark = pytest.mark.integration

USER = {"role": "user", "content": QUESTION}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]
LONG = 900  # tokens: a model with random weights may put much white space into its JSON


def formed(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


# Who answers


@pytest.mark.parametrize("step", range(SAVE_EVERY, STEPS + 1, SAVE_EVERY))
def test_every_announced_checkpoint_answers_as_itself(finished: Recorded, caller: Caller, step: int) -> None:
    answer = caller.chat(QUESTION, adapter=finished.checkpoint(step)).json()
    assert answer["system_fingerprint"].startswith(f"{finished.id}-step-{step}@") and answer["model"] == MODEL


def test_final_adapter_says_what_it_was_taught(finished: Recorded, caller: Caller) -> None:
    answer = caller.chat(QUESTION, adapter=finished.final).json()
    assert answer["content"] == ANSWER and answer["system_fingerprint"].startswith(f"{finished.id}-final@")


@pytest.mark.parametrize("name", [MODEL, MODEL.upper(), "Tiny", "tiny"])
def test_base_model_answers_by_its_name_in_any_case_and_the_name_is_echoed(caller: Caller, name: str) -> None:
    answer = caller.chat(baseModel=name)
    assert answer.status_code == 200 and answer.json()["model"] == name
    assert answer.json()["system_fingerprint"].startswith("base@")


def test_base_model_knows_nothing_of_the_adapter(finished: Recorded, caller: Caller) -> None:
    assert caller.chat(QUESTION, baseModel=MODEL).json()["content"] != ANSWER


# The shape of answers


def test_whole_answer_is_openais_with_its_text_once_more_on_top(finished: Recorded, caller: Caller) -> None:
    answer = caller.chat(QUESTION, adapter=finished.final)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert isinstance(body["created"], int)
    message = {"role": "assistant", "content": ANSWER}
    assert body["choices"] == [{"index": 0, "message": message, "finish_reason": "stop"}]
    assert body["content"] == ANSWER
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] and usage["prompt_tokens"] > 0


@pytest.mark.parametrize("stream", [True, None])
def test_answer_is_a_stream_of_chunks_unless_told_otherwise(
    finished: Recorded, caller: Caller, stream: bool | None
) -> None:
    body = {"messages": [USER], "adapter": finished.final, "temperature": 0}
    answer = caller.post("/v1/inference/chat", body if stream is None else {**body, "stream": stream})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content.startswith(b"data: {") and answer.content.endswith(b"data: [DONE]\n\n")
    found = chunks(answer.content)
    assert text_of(answer.content) == ANSWER
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["finish_reason"] for c in found] == [None] * (len(found) - 1) + ["stop"]
    for name in ("id", "created", "model", "system_fingerprint"):
        assert len({c[name] for c in found}) == 1
    assert all(c["object"] == "chat.completion.chunk" and "usage" not in c for c in found)


@pytest.mark.parametrize("spelling", ["includeUsage", "include_usage"])
def test_usage_comes_last_when_asked_for(finished: Recorded, caller: Caller, spelling: str) -> None:
    whole = caller.chat(QUESTION, adapter=finished.final).json()
    answer = caller.chat(QUESTION, adapter=finished.final, stream=True, streamOptions={spelling: True})
    assert chunks(answer.content)[-1] == {**chunks(answer.content)[-1], "choices": [], "usage": whole["usage"]}


def test_answer_cut_at_the_token_limit_says_so(finished: Recorded, caller: Caller) -> None:
    answer = caller.chat(QUESTION, adapter=finished.final, maxTokens=2).json()
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 2
    assert ANSWER.startswith(answer["content"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["over", ["nothing", "over"]])
def test_answer_ends_before_a_stop_text(finished: Recorded, caller: Caller, stop: Any, stream: bool) -> None:
    answer = caller.chat(QUESTION, adapter=finished.final, stop=stop, stream=stream)
    said = text_of(answer.content) if stream else answer.json()["content"]
    assert said == ANSWER[: ANSWER.index("over")]


def test_same_seed_says_the_same_and_nothing_is_cached(caller: Caller) -> None:
    first, second = (caller.chat(baseModel="tiny", temperature=1, seed=7).json() for _ in range(2))
    assert first["content"] == second["content"] and first["id"] != second["id"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, USER],
        [{"role": "user", "content": ""}],
        [USER, {"role": "assistant", "content": ""}, USER],
        [{"id": 1, **USER}, {"id": 2, "role": "assistant", "content": "yes", "extra": {"a": [1]}}, {"id": 3, **USER}],
        [{"role": "user", "content": "Zürich — 東京 🎈 \u2028 \x7f"}],
    ],
)
def test_messages_of_the_playground_are_accepted(caller: Caller, messages: list[Any]) -> None:
    answer = caller.post("/v1/inference/chat", {"messages": messages, "baseModel": "tiny", "maxTokens": 4})
    assert answer.status_code == 200, answer.text
    assert frames(answer.content)[-1].data == b"[DONE]"


@pytest.mark.parametrize(
    "fields",
    [
        {"presencePenalty": 0.5},
        {"frequencyPenalty": -0.5},
        {"logitBias": {"5": 1}},
        {"enableThinking": True},
        {"reasoningEffort": "low"},
        {"logprobs": True, "topLogprobs": 3},
        {"seed": 7},
        {"topP": 0.5},
        {"responseFormat": {"type": "text"}, "structuredOutputs": {"choice": ["yes"]}},
        {"tools": TOOLS, "toolChoice": "none"},
        {"someFieldOfTomorrow": {"a": 1}},
    ],
)
def test_fields_are_accepted_even_where_the_engine_has_no_use_for_them(caller: Caller, fields: dict[str, Any]) -> None:
    answer = caller.chat(baseModel="tiny", **{"maxTokens": 4, **fields})
    assert answer.status_code == 200, answer.text


# Constraints


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("constraint", "valid"),
    [
        ({"responseFormat": formed(SCHEMA, strict=True)}, SCHEMA),
        ({"responseFormat": formed(SCHEMA)}, SCHEMA),
        ({"structuredOutputs": {"json": SCHEMA, "disable_any_whitespace": True}}, SCHEMA),
        ({"structuredOutputs": {"json": SCHEMA, "whitespace_pattern": " ?"}}, SCHEMA),
        ({"structuredOutputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structuredOutputs": {"choice": ["yes", "no", "nö (±)"]}}, r"yes|no|nö \(±\)"),
        ({"structuredOutputs": {"grammar": 'start: "a" ("b" | "c")'}}, "a[bc]"),
    ],
)
def test_answer_keeps_to_its_constraint(
    finished: Recorded, caller: Caller, constraint: dict[str, Any], valid: Any, stream: bool
) -> None:
    answer = caller.chat(adapter=finished.final, maxTokens=LONG, stream=stream, **constraint)
    assert answer.status_code == 200, answer.text
    said = text_of(answer.content) if stream else answer.json()["content"]
    if isinstance(valid, str):
        assert re.fullmatch(valid, said)
    else:
        jsonschema.validate(json.loads(said), valid)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"paint", "stop"}),
        ({"type": "function", "function": {"name": "paint"}}, {"paint"}),
        ({"type": "function", "function": {"name": "stop"}}, {"stop"}),
    ],
)
def test_tool_call_is_forced_without_a_parser(caller: Caller, choice: Any, names: set[str]) -> None:
    answer = caller.chat(baseModel="tiny", maxTokens=LONG, tools=TOOLS, toolChoice=choice).json()
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"] and call["function"]["name"] in names
    schema = SCHEMA if call["function"]["name"] == "paint" else {"type": "object", "maxProperties": 0}
    jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["choices"][0]["message"]["content"] is None and answer["content"] is None


def test_streamed_tool_call_comes_in_pieces_that_make_one(caller: Caller) -> None:
    choice = {"type": "function", "function": {"name": "paint"}}
    answer = caller.chat(baseModel="tiny", maxTokens=LONG, tools=TOOLS, toolChoice=choice, stream=True)
    deltas = [c["choices"][0]["delta"] for c in chunks(answer.content)]
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", [])]
    assert {piece["index"] for piece in pieces} == {0} and pieces[0]["function"]["name"] == "paint"
    jsonschema.validate(json.loads("".join(piece["function"].get("arguments", "") for piece in pieces)), SCHEMA)


def test_tool_turns_of_a_conversation_are_accepted(caller: Caller) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "paint", "arguments": '{"colour": "red"}'}}
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    choice = {"type": "function", "function": {"name": "stop"}}
    body = {"messages": turns, "tools": TOOLS, "toolChoice": choice, "baseModel": "tiny", "stream": False}
    assert caller.post("/v1/inference/chat", {**body, "maxTokens": LONG}).status_code == 200


# Refusals


def test_choosing_a_tool_freely_needs_a_parser(caller: Caller) -> None:
    answer = caller.chat(baseModel="tiny", tools=TOOLS)
    assert "required" in assert_error(answer, 400, "tool_calling_not_configured")["error"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "adapter"),
        ({"baseModel": "tiny", "adapter": {"kind": "final", "jobId": UNKNOWN_ID}}, "adapter"),
        ({"baseModel": "no/such"}, "baseModel"),
        ({"adapter": {"kind": "newest", "jobId": UNKNOWN_ID}}, "adapter"),
        ({"adapter": {"kind": "checkpoint", "jobId": UNKNOWN_ID}}, "adapter.step"),
        ({"baseModel": "tiny", "messages": []}, "messages"),
        ({"baseModel": "tiny", "messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"baseModel": "tiny", "messages": [{"role": "assistant", "content": None}]}, "messages.0"),
        ({"baseModel": "tiny", "messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"baseModel": "tiny", "temperature": "hot"}, "temperature"),
        ({"baseModel": "tiny", "topP": 2}, "topP"),
        ({"baseModel": "tiny", "maxTokens": 0}, "maxTokens"),
        ({"baseModel": "tiny", "maxTokens": 100_000}, "maxTokens"),
        ({"baseModel": "tiny", "topLogprobs": 3}, "topLogprobs"),
        ({"baseModel": "tiny", "messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
        ({"baseModel": "tiny", "responseFormat": {"type": "json_schema"}}, "responseFormat"),
        ({"baseModel": "tiny", "responseFormat": formed({"type": "text"})}, "responseFormat.json_schema.schema"),
        (
            {"baseModel": "tiny", "responseFormat": formed({"type": "object", "properties": {"a": {}}}, strict=True)},
            "responseFormat.json_schema.schema",
        ),
        ({"baseModel": "tiny", "structuredOutputs": {}}, "structuredOutputs"),
        ({"baseModel": "tiny", "structuredOutputs": {"regex": "a", "choice": ["a"]}}, "structuredOutputs"),
        ({"baseModel": "tiny", "structuredOutputs": {"json": {"type": 5}}}, "structuredOutputs.json"),
        ({"baseModel": "tiny", "structuredOutputs": {"regex": "("}}, "structuredOutputs.regex"),
        ({"baseModel": "tiny", "structuredOutputs": {"choice": []}}, "structuredOutputs.choice"),
        ({"baseModel": "tiny", "structuredOutputs": {"grammar": " "}}, "structuredOutputs.grammar"),
        ({"baseModel": "tiny", "structuredOutputs": {"grammar": "start: nowhere"}}, "structuredOutputs.grammar"),
        ({"baseModel": "tiny", "structuredOutputs": {"json_object": False}}, "structuredOutputs.json_object"),
        (
            {"baseModel": "tiny", "structuredOutputs": {"regex": "a"}, "responseFormat": {"type": "json_object"}},
            "structuredOutputs",
        ),
        ({"baseModel": "tiny", "toolChoice": "required"}, "toolChoice"),
        (
            {"baseModel": "tiny", "tools": TOOLS, "toolChoice": {"type": "function", "function": {"name": "x"}}},
            "toolChoice",
        ),
        (
            {
                "baseModel": "tiny",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}],
            },
            "tools.0.function.parameters",
        ),
    ],
)
def test_request_that_cannot_be_served_is_400_before_any_stream(
    caller: Caller, fields: dict[str, Any], named: str, stream: bool
) -> None:
    answer = caller.post("/v1/inference/chat", {"messages": [USER], "stream": stream, **fields})
    body = assert_error(answer, 400)
    assert body["param"].startswith(named), body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", ["unknown job", "foreign job", "no such step", "huge step"])
def test_adapter_that_is_not_there_is_404(
    finished: Recorded, caller: Caller, stranger: Caller, what: str, stream: bool
) -> None:
    who = stranger if what == "foreign job" else caller
    job_id = UNKNOWN_ID if what == "unknown job" else finished.id
    step = {"no such step": 1, "huge step": 10**17}.get(what, STEPS)
    answer = who.chat(adapter={"kind": "checkpoint", "jobId": job_id, "step": step}, stream=stream)
    body = assert_error(answer, 404, "not_found")
    if "step" in what:
        assert "5, 10, 15, 20" in body["error"], "it names the checkpoints that there are"
