"""Rows of the accepted formats, brought to one shape: a conversation, or a plain text.

| format            | columns                                                                     |
| ----------------- | --------------------------------------------------------------------------- |
| chatml            | `messages`: a list of {role, content}, as OpenAI's fine-tuning files        |
| sharegpt          | `conversations`: a list of {from, value}                                    |
| alpaca            | `instruction`, `output`, and perhaps `input`, `system`                      |
| prompt_completion | `prompt`, `completion`: both text, or both lists of messages                |
| text              | `text`                                                                      |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from arkor_ray.errors import DatasetError
from arkor_ray.schemas.dataset import DatasetFormatName

Message = dict[str, Any]

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class RowError(ValueError):
    """One row cannot be used; the message says why. The other rows are not affected."""


@dataclass(frozen=True)
class Conversation:
    """`trained[i]` says whether loss on responses covers message i; it is true for assistant turns only."""

    messages: list[Message]
    trained: tuple[bool, ...]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class PlainText:
    text: str


def detect_format(row: Mapping[str, Any]) -> DatasetFormatName:
    """The format that the columns of a row speak for. Raises DatasetError that lists what would do."""
    columns = {name for name, value in row.items() if value is not None}
    if "messages" in columns:
        return "chatml"
    if "conversations" in columns or "conversation" in columns:
        return "sharegpt"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if "text" in columns:
        return "text"
    raise DatasetError(
        f"The data set's format cannot be told from its columns ({', '.join(sorted(columns)) or 'none'}). Use one of: "
        "messages; conversations; instruction and output; prompt and completion; text."
    )


def parse_row(row: Any, format_name: DatasetFormatName) -> Conversation | PlainText:
    """Raises RowError when `row` is not what `format_name` says."""
    if not isinstance(row, Mapping):
        raise RowError(f"is {_kind(row)}, not an object")
    return _PARSERS[format_name](row)


def role_of(turn: Mapping[str, Any]) -> str | None:
    """Whose turn it is, in OpenAI's words; None for a role that nobody knows."""
    return _ROLES.get(str(turn.get("role", turn.get("from"))).lower())


def _parse_chatml(row: Mapping[str, Any]) -> Conversation:
    for column in ("messages", "conversations", "conversation"):
        if row.get(column) is not None:
            return _conversation(_messages(row[column], column), row)
    raise RowError("has no 'messages'")


def _parse_sharegpt(row: Mapping[str, Any]) -> Conversation:
    for column in ("conversations", "conversation", "messages"):
        if row.get(column) is not None:
            messages = _messages(row[column], column)
            if isinstance(row.get("system"), str) and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": row["system"]})
            return _conversation(messages, row)
    raise RowError("has no 'conversations'")


def _parse_alpaca(row: Mapping[str, Any]) -> Conversation:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    context = row.get("input")
    if context is not None and not isinstance(context, str):
        raise RowError(f"'input' is {_kind(context)}, not text")
    if not instruction.strip():
        raise RowError("'instruction' is empty")
    messages = [
        {"role": "user", "content": f"{instruction}\n\n{context}" if context and context.strip() else instruction},
        {"role": "assistant", "content": output},
    ]
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    return _conversation(messages, row)


def _parse_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """Text becomes one user and one assistant turn, since adapters are served as chat models."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not prompt.strip():
            raise RowError("'prompt' is empty")
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _conversation(turns, row)
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = _messages(prompt, "prompt"), _messages(completion, "completion")
        return _conversation(before + after, row, first_trained=len(before))
    raise RowError(
        f"'prompt' is {_kind(prompt)} and 'completion' {_kind(completion)}; both must be text or both messages"
    )


def _parse_text(row: Mapping[str, Any]) -> PlainText:
    text = _text(row, "text")
    if not text.strip():
        raise RowError("'text' is empty")
    return PlainText(text)


_PARSERS: dict[DatasetFormatName, Callable[[Mapping[str, Any]], Conversation | PlainText]] = {
    "chatml": _parse_chatml,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
    "prompt_completion": _parse_prompt_completion,
    "text": _parse_text,
}


def _conversation(messages: list[Message], row: Mapping[str, Any], first_trained: int = 0) -> Conversation:
    """OpenAI's `weight: 0` on an assistant turn keeps it out of the loss."""
    trained = tuple(
        message["role"] == "assistant" and index >= first_trained and message.pop("weight", 1) != 0
        for index, message in enumerate(messages)
    )
    if not any(trained):
        raise RowError("has no assistant turn to learn from")
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"'tools' is {_kind(tools)}, not a list")
    return Conversation(messages, trained, tools or None)


def _messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError(f"'{column}' is {_kind(value)}, not a list of messages")
    return [_message(turn, f"{column}[{index}]") for index, turn in enumerate(value)]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"'{where}' is {_kind(turn)}, not an object")
    role = role_of(turn)
    if role is None:
        raise RowError(f"'{where}' has the unknown role {turn.get('role', turn.get('from'))!r}")
    content = turn.get("content", turn.get("value"))
    # Absent keys and nulls are the same: columnar formats fill every struct field of every message.
    message = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    return {"role": role, "content": _flat_content(content, where), **message}


def _flat_content(content: Any, where: str) -> str:
    """Text, or OpenAI's list of parts as long as all of them are text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise RowError(f"the content of '{where}' is {_kind(content)}, not text")


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise RowError(f"'{column}' is {_kind(value)}, not text")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    names = {str: "text", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
