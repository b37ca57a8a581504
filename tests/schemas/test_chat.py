"""The inference request: what reaches the engine, and what is refused rather than ignored."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.base import invalid_request
from arkor_ray.schemas.chat import ChatRequest, CheckpointAdapter, FinalAdapter

USER = {"role": "user", "content": "hi"}


def validate(body: dict[str, Any]) -> ChatRequest:
    """Raises as the server does."""
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        raise invalid_request(error) from error


def parse(**fields: Any) -> ChatRequest:
    return validate({"messages": [USER], "baseModel": "tiny", **fields})


def test_target_is_a_checkpoint_a_final_adapter_or_a_base_model() -> None:
    final = validate({"messages": [USER], "adapter": {"kind": "final", "jobId": "j"}})
    assert final.adapter == FinalAdapter(kind="final", job_id="j")
    checkpoint = validate({"messages": [USER], "adapter": {"kind": "checkpoint", "jobId": "j", "step": 3}})
    assert isinstance(checkpoint.adapter, CheckpointAdapter) and checkpoint.adapter.step == 3


@pytest.mark.parametrize(
    "target",
    [
        {},
        {"baseModel": "x", "adapter": {"kind": "final", "jobId": "j"}},
        {"adapter": {"kind": "newest", "jobId": "j"}},
        {"adapter": {"kind": "checkpoint", "jobId": "j"}},
        {"adapter": {"kind": "checkpoint", "jobId": "j", "step": -1}},
        {"adapter": "j"},
    ],
)
def test_other_targets_are_refused(target: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        validate({"messages": [USER], **target})


def test_template_sees_only_what_belongs_to_a_message() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "hi", "id": 7, "createdAt": "now"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    assert parse(messages=messages).for_engine()["messages"] == [
        {"role": "system", "content": ""},
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant"},
        {"role": "assistant", "tool_calls": []},
        {"role": "tool", "content": "x"},
        {"role": "function", "content": "x"},
        "hi",
    ],
)
def test_incomplete_messages_are_refused(message: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"messages\.1"):
        parse(messages=[USER, message])


@pytest.mark.parametrize(("stop", "expected"), [(None, []), ("END", ["END"]), (["a", "b"], ["a", "b"])])
def test_stop_is_one_text_or_several(stop: Any, expected: list[str]) -> None:
    assert parse(stop=stop).for_engine()["stop"] == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("topP", 0),
        ("topP", 1.1),
        ("maxTokens", 0),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 1025]),
        ("seed", 2**63),
        ("topLogprobs", 21),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse(**{field: value})
    assert raised.value.param == field


def test_fields_that_mean_nothing_here_are_fine() -> None:
    assert parse(tools=[], toolChoice="auto", presencePenalty=1, reasoningEffort="low")
