"""Requests made to exhaust the server: each is refused by name, or answered, and whoever else is served notices nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.contract.wire import Caller, assert_error, chunks

pytestmark = pytest.mark.integration


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def doubling(levels: int) -> dict[str, Any]:
    """A small schema whose documents have 2 to the power of `levels` leaves."""
    parts: dict[str, Any] = {
        f"d{i}": {
            "type": "object",
            "properties": {side: {"$ref": f"#/$defs/d{i + 1}"} for side in ("left", "right")},
            "required": ["left", "right"],
            "additionalProperties": False,
        }
        for i in range(levels)
    }
    return {"$defs": {**parts, f"d{levels}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def formed(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


# Arkor's field, what it holds, and the field that the refusal names.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a prompt of 1 MB": ({"messages": [{"role": "user", "content": "word " * 200_000}]}, "messages"),
    "a prompt of 1 MB without a space": ({"messages": [{"role": "user", "content": "a" * 1_000_000}]}, "messages"),
    "a prompt of 1 MB of emoji": ({"messages": [{"role": "user", "content": "🎈" * 250_000}]}, "messages"),
    "5,000 messages": ({"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
    "10,000 stop texts": ({"stop": [f"s{i}" for i in range(10_000)]}, "stop"),
    "a stop text of 1 MB": ({"stop": "x" * 1_000_000}, "stop"),
    "a deep schema": ({"responseFormat": formed(nested(150))}, "responseFormat.json_schema.schema"),
    "a large schema": (
        {"responseFormat": formed({"enum": [f"value {i}" for i in range(50_000)]})},
        "responseFormat.json_schema.schema",
    ),
    "a schema that refers to itself alone": (
        {"structuredOutputs": {"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}},
        "structuredOutputs.json",
    ),
    "a schema that refers to the network": (
        {"structuredOutputs": {"json": {"$ref": "http://127.0.0.1:1/schema.json"}}},
        "structuredOutputs.json",
    ),
    "look-ahead": ({"structuredOutputs": {"regex": "(?=(a+)+$)a"}}, "structuredOutputs.regex"),
    "back-references": ({"structuredOutputs": {"regex": r"(a+)\1+"}}, "structuredOutputs.regex"),
    "a regex of a thousand nested groups": (
        {"structuredOutputs": {"regex": "(" * 4000 + ")" * 4000}},
        "structuredOutputs.regex",
    ),
    "a regex of 1 MB": ({"structuredOutputs": {"regex": "a" * 1_000_000}}, "structuredOutputs.regex"),
    "a grammar of 1 MB": ({"structuredOutputs": {"grammar": "start: " + '"a" ' * 250_000}}, "structuredOutputs.grammar"),
    "100,000 choices": ({"structuredOutputs": {"choice": [f"c{i}" for i in range(100_000)]}}, "structuredOutputs.choice"),
    "200 tools": (
        {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(200)], "toolChoice": "required"},
        "tools",
    ),
    "tools with 1 MB of parameters": (
        {
            "tools": [
                {"type": "function", "function": {"name": f"f{i}", "parameters": {"enum": ["x" * 8000] * 2}}}
                for i in range(64)
            ],
            "toolChoice": "required",
        },
        "tools",
    ),
}  # fmt: skip
# Patterns that take for ever where they are matched by going back, and documents that are huge: fine for an automaton.
HARMLESS: dict[str, dict[str, Any]] = {
    "nested repetition": {"structuredOutputs": {"regex": "(a+)+b"}},
    "overlapping alternatives": {"structuredOutputs": {"regex": "(a|a|aa)*b"}},
    "a schema whose documents explode": {"responseFormat": formed(doubling(30))},
    "a pattern in a schema": {
        "structuredOutputs": {"json": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}}
    },
    "a million items": {"structuredOutputs": {"json": {"type": "array", "minItems": 1_000_000, "items": {}}}},
    "an endless grammar": {"structuredOutputs": {"grammar": 'start: "a" start | "b"'}},
}


class Bystander:
    """Streams one long answer, on a connection of its own, and tells whether it came whole."""

    TOKENS = 300

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self.begun = threading.Event()
        self.body = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        # A regex that no token ends: the answer is as long as it may be.
        body = {
            "messages": [{"role": "user", "content": "hello"}],
            "baseModel": "tiny",
            "maxTokens": self.TOKENS,
            "structuredOutputs": {"regex": "[a-z ]{100000}"},
            "streamOptions": {"includeUsage": True},
        }
        with self._caller.stream("POST", "/v1/inference/chat", json=body) as answer:
            for chunk in answer.iter_raw():
                self.body += chunk
                self.begun.set()

    def assert_whole(self) -> None:
        self._thread.join(120)
        found = chunks(self.body)
        assert found[-1]["usage"]["completion_tokens"] == self.TOKENS
        assert found[-2]["choices"][0]["finish_reason"] == "length"


@pytest.fixture
def bystander(caller: Caller) -> Iterator[Bystander]:
    made = Bystander(caller)
    assert made.begun.wait(120)
    yield made
    made.assert_whole()


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name_while_another_stream_goes_on(caller: Caller, bystander: Bystander, what: str) -> None:
    fields, named = REFUSED[what]
    answer = caller.chat(**{"baseModel": "tiny", **fields})
    body = assert_error(answer, 400)
    assert body["param"] == named and named in body["error"]
    assert len(answer.content) < 2000, "what was sent is not sent back"


@pytest.mark.parametrize("what", HARMLESS)
def test_answered_while_another_stream_goes_on(caller: Caller, bystander: Bystander, what: str) -> None:
    answer = caller.chat(baseModel="tiny", **{"maxTokens": 32, **HARMLESS[what]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 32


def test_body_over_the_limit_is_refused_while_another_stream_goes_on(caller: Caller, bystander: Bystander) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 9 * 2**20}], "baseModel": "tiny"})
    assert_error(caller.post("/v1/inference/chat", content=body), 413, "payload_too_large")


def test_many_hostile_requests_at_once_leave_the_service_as_it_was(caller: Caller, bystander: Bystander) -> None:
    statuses: list[int] = []

    def ask(fields: dict[str, Any]) -> None:
        statuses.append(caller.chat(**{"baseModel": "tiny", **fields}).status_code)

    threads = [threading.Thread(target=ask, args=(fields,)) for fields, _ in REFUSED.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert statuses == [400] * len(REFUSED)
    assert caller.chat(baseModel="tiny", maxTokens=4).status_code == 200
    assert caller.http.get("/readyz").status_code == 200
