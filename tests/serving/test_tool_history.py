"""Earlier calls in the forms that templates want."""

from __future__ import annotations

import json
from typing import Any

from arkor_ray.serving.tool_history import history_forms

USER = {"role": "user", "content": "hi"}


def call(arguments: Any, name: str = "f") -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_messages_without_calls_are_left_alone() -> None:
    messages = [USER, {"role": "assistant", "content": "x"}]
    assert history_forms(messages, "") == [messages]


def test_arguments_are_an_object_first_and_text_where_the_template_refuses_that() -> None:
    messages = [USER, {"role": "assistant", "tool_calls": [call('{"a": 1}'), call(""), call("[1]"), call("oops")]}]
    objects, texts = history_forms(messages, "{{ message.tool_calls }}")
    found = [c["function"]["arguments"] for c in objects[1]["tool_calls"]]
    assert found == [{"a": 1}, {}, "[1]", "oops"]
    assert texts is messages and messages[1]["tool_calls"][0] == call('{"a": 1}')


def test_template_without_calls_gets_them_as_content() -> None:
    asked = {"role": "assistant", "content": "Wait.", "tool_calls": [call('{"a": "é"}'), call("{}", "g")]}
    [[user, assistant]] = history_forms([USER, asked], "{{ message.content }}")
    assert user == USER and "tool_calls" not in assistant
    said, first, second = assistant["content"].split("\n")
    assert said == "Wait." and "é" in first
    assert json.loads(first) == {"name": "f", "arguments": {"a": "é"}}
    assert json.loads(second) == {"name": "g", "arguments": {}}
