"""A replica whose model says nothing sensible, under constraints: every answer that ends is one that was asked for."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import jsonschema
import pytest

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.chat import ChatRequest
from arkor_ray.serving.app import InferenceArgs
from arkor_ray.serving.llm_server import LLMServer
from arkor_ray.storage.local import LocalStore
from tests.serving.schemas import SCHEMAS, TICKET, UNSUPPORTED, strict
from tests.serving.tiny import commit_adapter, make_adapter, make_model, save_base

pytestmark = pytest.mark.anyio

ADAPTER = "job-step-1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLMServer]:
    """One adapter on a model whose vocabulary is wider than its tokenizer's, with room for long answers."""
    folder = tmp_path_factory.mktemp("constrained")
    model = make_model(vocab=352, max_position_embeddings=4096)
    base = str(save_base(model, folder / "base"))
    commit_adapter(LocalStore(folder / "store"), make_adapter(model, folder / "a", seed=1), "job", 1, base_model=base)
    server = LLMServer(
        InferenceArgs(
            base_model=base, base_precision="fp32", storage_url=f"file://{folder / 'store'}",
            cache_dir=str(folder / "cache"), slots=2, rows=8, max_len=3000, cpu_threads=1,
        )
    )  # fmt: skip
    yield server
    server.close()


async def chat(server: LLMServer, adapter_id: str | None = None, **fields: Any) -> tuple[str, str]:
    """The text and why it ended."""
    asked = {"messages": [{"role": "user", "content": "hi"}], "baseModel": "x", "temperature": 1, **fields}
    items = [item async for item in server.chat(ChatRequest.model_validate(asked).for_engine(), adapter_id)]
    return "".join(item["text"] for item in items if item["type"] == "delta"), items[-1]["finish_reason"]


def format_of(schema: dict[str, Any], *, strictly: bool = False) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": strictly}}


@pytest.mark.parametrize("name", SCHEMAS)
async def test_answers_that_end_are_valid(server: LLMServer, name: str) -> None:
    """Base and adapter, greedy and sampled, mixed in the batch with an answer that is free."""
    schema = SCHEMAS[name]
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    check = validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    asked = {"responseFormat": format_of(schema), "maxTokens": 150}
    free, *found = await asyncio.gather(
        chat(server, maxTokens=60, seed=1),
        chat(server, temperature=0, **asked),
        *(chat(server, (None, ADAPTER)[seed % 2], seed=seed, **asked) for seed in range(6)),
    )
    assert {reason for _, reason in found} <= {"stop", "length"}
    for text, reason in found:
        if reason == "stop":
            check.validate(json.loads(text))
    assert free == await chat(server, maxTokens=60, seed=1)


async def test_most_answers_do_end(server: LLMServer) -> None:
    """Or the test above would show nothing."""
    bounded = ["triage with an enum", "tuple", "array bounds", "format uuid", "number bounds", "enum of many types"]
    found = await asyncio.gather(
        *(chat(server, seed=1, maxTokens=400, responseFormat=format_of(SCHEMAS[name])) for name in bounded)
    )
    assert [reason for _, reason in found] == ["stop"] * len(bounded)


@pytest.mark.parametrize("adapter_id", [None, ADAPTER])
async def test_ticket_is_triaged_into_its_four_texts(server: LLMServer, adapter_id: str | None) -> None:
    schema = strict({name: {"type": "string"} for name in TICKET})
    asked = {"responseFormat": format_of(schema, strictly=True), "maxTokens": 2500}
    found = await asyncio.gather(*(chat(server, adapter_id, seed=seed, **asked) for seed in range(6)))
    ended = [json.loads(text) for text, reason in found if reason == "stop"]
    assert ended, "a random model closes its strings sooner or later"
    for ticket in ended:
        assert list(ticket) == TICKET and all(isinstance(value, str) for value in ticket.values())


@pytest.mark.parametrize(
    "outputs", [{"json_object": True}, {"json": {"type": "object"}, "disable_any_whitespace": True}]
)
async def test_json_object_is_an_object(server: LLMServer, outputs: dict[str, Any]) -> None:
    found = await asyncio.gather(
        *(chat(server, seed=seed, maxTokens=600, structuredOutputs=outputs) for seed in range(8)),
        chat(server, seed=9, maxTokens=600, responseFormat={"type": "json_object"}),
    )
    ended = [text for text, reason in found if reason == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)


async def test_regex_choice_and_grammar(server: LLMServer) -> None:
    lark = 'start: sum\nsum: INT ("+" INT)~1..3\nINT: /[0-9]{1,4}/'
    regexes = {r"\d{3}-\d{4}": r"\d{3}-\d{4}", "(yes|no)!?": "(yes|no)!?"}
    for temperature in (0, 1):
        for regex, expected in regexes.items():
            text, reason = await chat(server, structuredOutputs={"regex": regex}, temperature=temperature)
            assert re.fullmatch(expected, text) and reason == "stop"
        choices = ["billing", "é😀", "other thing"]
        text, reason = await chat(server, ADAPTER, structuredOutputs={"choice": choices}, temperature=temperature)
        assert text in choices and reason == "stop"
        text, reason = await chat(server, structuredOutputs={"grammar": lark}, temperature=temperature)
        assert re.fullmatch(r"\d{1,4}(\+\d{1,4}){1,3}", text) and reason == "stop"


async def test_seed_repeats_a_constrained_answer(server: LLMServer) -> None:
    asked = {"responseFormat": format_of(SCHEMAS["triage with an enum"]), "seed": 4, "maxTokens": 200}
    first = await chat(server, ADAPTER, **asked)
    again, *_ = await asyncio.gather(chat(server, ADAPTER, **asked), *(chat(server, seed=n) for n in range(3)))
    assert first == again


async def test_what_the_engine_cannot_enforce_is_refused_before_the_first_token(server: LLMServer) -> None:
    before = (await server.stats())["engine"]["generated_tokens"]
    for name, schema in UNSUPPORTED.items():
        with pytest.raises(InvalidRequestError, match=r"responseFormat\.json_schema\.schema") as raised:
            await chat(server, responseFormat=format_of(schema))
        assert raised.value.http_status == 400, name
    for outputs in ({"regex": r"(a)\1"}, {"grammar": "start: nothing"}):
        with pytest.raises(InvalidRequestError, match=f"structuredOutputs.{next(iter(outputs))}"):
            await chat(server, structuredOutputs=outputs)
    assert (await server.stats())["engine"]["generated_tokens"] == before


async def test_megabyte_of_prompt_is_refused(server: LLMServer) -> None:
    with pytest.raises(InvalidRequestError, match="messages: the prompt has"):
        await chat(server, messages=[{"role": "user", "content": "fine " * 200_000}])


async def test_disconnect_frees_the_row(server: LLMServer) -> None:
    asked = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "hi"}], "baseModel": "x", "structuredOutputs": {"regex": "a*b"}}
    )
    async with aclosing(server.chat(asked.for_engine(), None)) as items:  # type: ignore[type-var]
        await anext(items)
    async with asyncio.timeout(5):
        while (await server.stats())["engine"]["rows_busy"]:
            await asyncio.sleep(0.002)
