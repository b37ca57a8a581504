"""OpenAI's request: how its fields become those of the arkor wire, and that errors speak OpenAI's spelling."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.base import invalid_request
from arkor_ray.schemas.chat import ChatRequest
from arkor_ray.schemas.openai import ChatCompletionRequest

USER = {"role": "user", "content": "hi"}
TARGET = {"baseModel": "tiny"}


def chat(**fields: Any) -> ChatRequest:
    body = ChatCompletionRequest.model_validate({"messages": [USER], **fields})
    with body.own_spelling():
        return body.to_chat(TARGET)


def test_fields_reach_the_engine_under_one_name() -> None:
    sent = chat(temperature=0.5, top_p=0.9, max_tokens=7, stop="END", seed=3).for_engine()
    expected = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "stop": ["END"], "seed": 3, "messages": [USER]}
    assert {name: sent[name] for name in expected} == expected


def test_both_wires_say_the_same_to_the_engine() -> None:
    arkor = {"messages": [USER], **TARGET, "topP": 0.9, "maxTokens": 7, "responseFormat": {"type": "text"}}
    assert (
        chat(top_p=0.9, max_tokens=7, response_format={"type": "text"}).for_engine()
        == ChatRequest.model_validate(arkor).for_engine()
    )


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}


@pytest.mark.parametrize(
    ("fields", "arkor"),
    [
        ({"response_format": SCHEMA_FORMAT}, {"responseFormat": SCHEMA_FORMAT}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"structuredOutputs": {"choice": ["a", "b"]}}),
        ({"guided_choice": ["a", "b"]}, {"structuredOutputs": {"choice": ["a", "b"]}}),
        ({"guided_json": {"type": "object"}}, {"structuredOutputs": {"json": {"type": "object"}}}),
        ({"tools": [TOOL], "tool_choice": "required"}, {"tools": [TOOL], "toolChoice": "required"}),
    ],
)
def test_constraints_and_tools_are_those_of_the_arkor_wire(fields: dict[str, Any], arkor: dict[str, Any]) -> None:
    asked = chat(**fields).for_engine()
    assert asked == ChatRequest.model_validate({"messages": [USER], **TARGET, **arkor}).for_engine()
    assert asked["constraint"] is not None


def test_answer_is_whole_unless_a_stream_is_asked_for() -> None:
    assert chat().stream is False and chat(stream=True).stream is True


@pytest.mark.parametrize(
    ("fields", "limit"),
    [({}, None), ({"max_completion_tokens": 5}, 5), ({"max_completion_tokens": 5, "max_tokens": 5}, 5)],
)
def test_both_names_of_the_token_limit_are_read(fields: dict[str, Any], limit: int | None) -> None:
    assert chat(**fields).for_engine()["max_tokens"] == limit


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert chat(messages=[{"role": "user", "content": parts}]).for_engine()["messages"] == [
        {"role": "user", "content": "one two"}
    ]


def test_developer_turn_is_the_system_turn() -> None:
    messages = chat(messages=[{"role": "developer", "content": "be brief"}, USER]).for_engine()["messages"]
    assert messages[0] == {"role": "system", "content": "be brief"}


def test_answer_of_the_openai_package_can_be_sent_back() -> None:
    """It fills in every field that it knows, most of them with null."""
    answer = {"role": "assistant", "content": "yes", "refusal": None, "audio": None, "tool_calls": None}
    assert chat(messages=[USER, answer, USER]).for_engine()["messages"][1] == {"role": "assistant", "content": "yes"}


def test_fields_that_change_nothing_for_us_are_ignored() -> None:
    ignored = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "modalities": ["text"]}
    without = {"presence_penalty": 1, "frequency_penalty": 1, "logit_bias": {"50": -1}, "reasoning_effort": "low"}
    assert chat(n=1, **ignored, **without).for_engine() == chat().for_engine()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"audio": {"voice": "a"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_what_would_be_answered_otherwise_than_asked_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as raised:
        chat(**fields)
    assert invalid_request(raised.value).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [USER, {"role": "user", "content": [{"type": "image_url"}]}]}, "messages.1.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages.0.content.0.type"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": [""]}, "stop"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools.0.function.name"),
        ({"tools": [TOOL], "guided_regex": "a"}, "tools"),
    ],
)
def test_bad_value_is_named_in_this_wires_spelling(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        chat(**fields)
    assert raised.value.param == param
    assert raised.value.message.startswith(param.partition(".")[0])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"structured_outputs": {"json": 7}}, "structured_outputs"),
        ({"guided_json": 7}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
    ],
)
def test_constraint_that_cannot_be_kept_is_refused_by_its_own_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        chat(**fields)
    assert (raised.value.param or "").partition(".")[0] == param
    assert "structuredOutputs" not in raised.value.message and "responseFormat" not in raised.value.message


def test_value_that_was_sent_is_shown_as_it_was() -> None:
    with pytest.raises(InvalidRequestError, match=r"messages.0.role: .*\(got 'maxTokens'\)"):
        chat(messages=[{"role": "maxTokens", "content": "x"}])


def test_error_that_only_the_replica_finds_is_respelled_too() -> None:
    body = ChatCompletionRequest.model_validate({"messages": [USER], "guided_regex": "(", "max_completion_tokens": 9})
    told = InvalidRequestError("structuredOutputs.regex: is no regular expression; see maxTokens", param="maxTokens")
    with pytest.raises(InvalidRequestError) as raised, body.own_spelling():
        raise told
    assert raised.value.message == "guided_regex: is no regular expression; see max_completion_tokens"
    assert raised.value.param == "max_completion_tokens" and raised.value.code == told.code
