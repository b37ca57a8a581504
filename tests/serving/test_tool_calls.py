"""Calls of tools by a replica: forced ones from any model, free ones where the template shows their form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.chat import ChatRequest
from arkor_ray.serving.answer_reader import AnswerReader
from arkor_ray.serving.app import InferenceArgs
from arkor_ray.serving.chat_tokenizer import ChatTokenizer
from arkor_ray.serving.llm_server import LLMServer
from arkor_ray.serving.tool_parsers import ForcedCall, parser_for
from arkor_ray.storage.local import LocalStore
from tests.serving.schemas import strict
from tests.serving.tiny import TEMPLATE, commit_adapter, make_adapter, make_model, make_tokenizer, save_base

pytestmark = pytest.mark.anyio

HERMES_ADAPTER, OTHER_ADAPTER = "job-step-1", "job-step-2"
#: Shows the tools and the form of a call, as Qwen's template does.
HERMES = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    '<tool_call>{"name": <name>, "arguments": <arguments>}</tool_call>{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments.city }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARGUMENTS = {
    "get_weather": strict(
        {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 14}}
    ),
    "set_alarm": strict({"at": {"type": "string", "format": "time"}, "on": {"type": "boolean"}}),
    "stop": strict({}),
}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": ARGUMENTS[name], **more}}


TOOLS = [tool(name) for name in ARGUMENTS]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLMServer]:
    """The base and one adapter have a template that knows nothing of tools, the other adapter one that does."""
    folder = tmp_path_factory.mktemp("tools")
    model = make_model(max_position_embeddings=2048)
    base, store = str(save_base(model, folder / "base")), LocalStore(folder / "store")
    for step, template in ((1, HERMES), (2, TEMPLATE)):
        adapter = make_adapter(model, folder / str(step), seed=step)
        commit_adapter(store, adapter, "job", step, base_model=base, tokenizer=make_tokenizer(template))
    server = LLMServer(
        InferenceArgs(
            base_model=base, base_precision="fp32", storage_url=f"file://{folder / 'store'}",
            cache_dir=str(folder / "cache"), slots=2, rows=8, max_len=2000, cpu_threads=1,
        )
    )  # fmt: skip
    yield server
    server.close()


async def chat(server: LLMServer, adapter_id: str | None = None, **fields: Any) -> SimpleNamespace:
    asked = {
        "messages": [{"role": "user", "content": "hi"}],
        "baseModel": "x",
        "temperature": 1,
        "maxTokens": 300,
        **fields,
    }
    items = [item async for item in server.chat(ChatRequest.model_validate(asked).for_engine(), adapter_id)]
    pieces = [item for item in items if item["type"] == "tool_call_delta"]
    return SimpleNamespace(
        text="".join(item["text"] for item in items if item["type"] == "delta"),
        pieces=pieces,
        name=pieces[0]["name"] if pieces else None,
        arguments="".join(piece["arguments"] for piece in pieces),
        start=items[0],
        reason=items[-1]["finish_reason"],
    )


@pytest.mark.parametrize("adapter_id", [None, HERMES_ADAPTER, OTHER_ADAPTER])
@pytest.mark.parametrize("choice", ["required", named("set_alarm")])
async def test_forced_call_is_one_whatever_the_model_and_its_template(
    server: LLMServer, adapter_id: str | None, choice: Any
) -> None:
    asked = {"tools": TOOLS, "toolChoice": choice}
    found = await asyncio.gather(
        chat(server, adapter_id, temperature=0, **asked),
        *(chat(server, adapter_id, seed=seed, **asked) for seed in range(7)),
    )
    for answer in found:
        assert answer.text == "" and answer.reason == "tool_calls"
        assert answer.name in ARGUMENTS if choice == "required" else answer.name == "set_alarm"
        jsonschema.validate(json.loads(answer.arguments), ARGUMENTS[answer.name])
        assert [("id" in piece, "name" in piece) for piece in answer.pieces] == [
            (i == 0, i == 0) for i in range(len(answer.pieces))
        ]
        assert len(answer.pieces[0]["id"]) == 9 and answer.pieces[0]["id"].isalnum()
        assert all(piece["index"] == 0 for piece in answer.pieces)
    assert len({answer.pieces[0]["id"] for answer in found}) == len(found)
    if choice == "required":
        assert len({answer.name for answer in found}) > 1, "the model chooses among them"


async def test_stop_text_does_not_cut_a_forced_call(server: LLMServer) -> None:
    answer = await chat(server, tools=TOOLS, toolChoice=named("get_weather"), stop=['"', "{", "1", "a"], seed=1)
    jsonschema.validate(json.loads(answer.arguments), ARGUMENTS["get_weather"])


async def test_forced_call_that_is_cut_says_so(server: LLMServer) -> None:
    answer = await chat(server, tools=TOOLS, toolChoice=named("get_weather"), maxTokens=40, seed=1)
    assert answer.reason == "length" and answer.name == "get_weather"
    with pytest.raises(ValueError):
        json.loads(answer.arguments)


async def test_choice_is_not_left_to_a_model_whose_template_shows_no_form(server: LLMServer) -> None:
    for adapter_id in (None, OTHER_ADAPTER):
        with pytest.raises(InvalidRequestError, match="required") as raised:
            await chat(server, adapter_id, tools=TOOLS)
        assert (raised.value.code, raised.value.param) == ("tool_calling_not_configured", "tools")
    assert (await chat(server, tools=TOOLS, toolChoice="none", maxTokens=5)).reason == "length"


async def test_free_choice_shows_the_model_its_tools(server: LLMServer) -> None:
    plain = await chat(server, HERMES_ADAPTER, maxTokens=20)
    free = await chat(server, HERMES_ADAPTER, tools=TOOLS, maxTokens=20)
    assert free.start["prompt_tokens"] > plain.start["prompt_tokens"] + 100
    assert free.reason == "length" and free.text and free.name is None


async def test_strict_arguments_are_refused_where_only_the_model_chooses(server: LLMServer) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        await chat(server, HERMES_ADAPTER, tools=[tool("stop"), tool("set_alarm", strict=True)])
    assert raised.value.param == "tools.1.function.strict"
    assert (await chat(server, tools=[tool("stop", strict=True)], toolChoice="required")).arguments == "{}"


async def test_parameters_that_cannot_be_enforced_are_refused_by_their_tool(server: LLMServer) -> None:
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(InvalidRequestError, match="cannot be enforced") as raised:
        await chat(server, tools=[TOOLS[0], bad], toolChoice="required")
    assert raised.value.param == "tools.1.function.parameters"


async def test_earlier_calls_are_part_of_the_prompt(server: LLMServer) -> None:
    """The template of the one adapter writes the calls itself, and takes their arguments apart; the base's has them as
    content."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages = [
        {"role": "user", "content": "hi"},
        said,
        {"role": "tool", "content": "rain", "tool_call_id": "abcdefghi"},
    ]
    asked = ChatRequest.model_validate({"messages": messages, "baseModel": "x"}).for_engine()["messages"]
    hermes = ChatTokenizer(make_tokenizer(HERMES), "x")
    assert "<tool_call>Oslo</tool_call>" in hermes.decode(list(hermes.encode_chat(asked)))
    plain = ChatTokenizer(make_tokenizer(), "x")
    assert '{"name": "get_weather", "arguments": {"city": "Oslo"}}' in plain.decode(list(plain.encode_chat(asked)))
    for adapter_id in (None, HERMES_ADAPTER):
        answer = await chat(server, adapter_id, messages=messages, tools=TOOLS, toolChoice="required", seed=1)
        assert answer.reason == "tool_calls"


def read(text: str, *, stops: list[str], tokenizer: ChatTokenizer, parser: Any) -> tuple[list[dict[str, Any]], bool]:
    """The items of an answer in which the model wrote `text`, and whether a stop text ended it."""
    reader = AnswerReader(tokenizer.decoder(parser.markers), stops, parser)
    stopped = any(reader.push(token) for token in tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"])
    stopped = stopped or reader.finish(complete=True)
    return reader.take(), stopped


def test_free_call_is_read_out_of_the_tokens() -> None:
    tokenizer = ChatTokenizer(make_tokenizer(HERMES), "x")
    parser = parser_for(tokenizer.template_text, ["get_weather"])
    written = 'Wait. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich END"}}\n</tool_call>'
    items, stopped = read(written, stops=["END"], tokenizer=tokenizer, parser=parser)
    assert not stopped, "stop texts are about content"
    assert [item["type"] for item in items] == ["delta", "tool_call_delta"] and items[0]["text"] == "Wait."
    assert json.loads(items[1]["arguments"]) == {"city": "Zürich END"}


def test_stop_text_ends_the_content_before_a_call() -> None:
    tokenizer = ChatTokenizer(make_tokenizer(HERMES), "x")
    parser = parser_for(tokenizer.template_text, ["get_weather"])
    items, stopped = read("Wait. END <tool_call>{}", stops=["END"], tokenizer=tokenizer, parser=parser)
    assert stopped and [item["text"] for item in items] == ["Wait. "]


def test_special_tokens_are_visible_only_where_they_mark_a_call() -> None:
    inner = make_tokenizer(TEMPLATE + "[TOOL_CALLS]")
    inner.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]"]})
    tokenizer = ChatTokenizer(inner, "x")
    parser = parser_for(tokenizer.template_text, ["get_weather"])
    items, _ = read('<s>[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}', stops=[], tokenizer=tokenizer, parser=parser)
    assert [(item["type"], item.get("name")) for item in items] == [("tool_call_delta", "get_weather")]
    items, _ = read("<s>a[TOOL_CALLS]", stops=[], tokenizer=tokenizer, parser=ForcedCall())
    assert items == [{"type": "delta", "text": "a"}]
