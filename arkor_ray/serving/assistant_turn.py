"""The assistant's turn out of the items of a generation."""

from __future__ import annotations

from typing import Any


class AssistantTurn:
    """Grows with `add`, in the order in which `LLMServer.chat` yields them; `message` is the turn in OpenAI's shape."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, item: dict[str, Any]) -> bool:
        """Whether `item` is part of the turn."""
        if item["type"] == "delta":
            self._text.append(item["text"])
        elif item["type"] == "tool_call_delta" and "name" in item:
            self._calls.append({key: value for key, value in call_delta(item).items() if key != "index"})
        elif item["type"] == "tool_call_delta":
            self._calls[item["index"]]["function"]["arguments"] += item["arguments"]
        else:
            return False
        return True

    @property
    def message(self) -> dict[str, Any]:
        """`content` is None where the turn is calls of tools and nothing else."""
        text = "".join(self._text)
        if not self._calls:
            return {"role": "assistant", "content": text}
        return {"role": "assistant", "content": text or None, "tool_calls": self._calls}


def call_delta(item: dict[str, Any]) -> dict[str, Any]:
    """A piece of a call in OpenAI's shape; the first of a call has its id and name."""
    if "name" not in item:
        return {"index": item["index"], "function": {"arguments": item["arguments"]}}
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"index": item["index"], "id": item["id"], "type": "function", "function": function}
