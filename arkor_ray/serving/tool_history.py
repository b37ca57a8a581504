"""Earlier calls of tools, as chat templates want to see them."""

from __future__ import annotations

import json
from typing import Any


def history_forms(messages: list[dict[str, Any]], template: str) -> list[list[dict[str, Any]]]:
    """The messages in the forms to try, best first.

    Most templates write the arguments of a call as JSON themselves and so want an object; a few want OpenAI's JSON text.
    One that knows nothing of calls gets them as content, in the form that a forced call has, for else it would drop them.
    """
    if not any(isinstance(message, dict) and message.get("tool_calls") for message in messages):
        return [messages]
    if "tool_calls" not in template:
        return [[_calls_as_content(message) for message in messages]]
    return [[_with_objects(message) for message in messages], messages]


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    return {**call, "function": {**function, "arguments": _object(function.get("arguments"))}}


def _object(arguments: Any) -> Any:
    """The object that JSON text stands for; anything else as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _calls_as_content(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [call.get("function") or {} for call in calls]
    lines = [
        json.dumps({"name": f.get("name"), "arguments": _object(f.get("arguments"))}, ensure_ascii=False)
        for f in functions
    ]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join([*([message["content"]] if message.get("content") else []), *lines])}
