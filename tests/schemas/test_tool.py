"""Tools and the choice among them: what is refused, and which call an answer must be."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.base import invalid_request
from arkor_ray.schemas.chat import ChatRequest

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str = "get_weather", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def for_engine(**fields: Any) -> dict[str, Any]:
    """What the replica gets; raises as the server does."""
    body = {"messages": [{"role": "user", "content": "hi"}], "baseModel": "tiny", **fields}
    try:
        return ChatRequest.model_validate(body).for_engine()
    except ValidationError as error:
        raise invalid_request(error) from error


@pytest.mark.parametrize("choice", [None, "auto"])
def test_model_may_choose_unless_told_otherwise(choice: str | None) -> None:
    tools = [tool(description="d", parameters=CITY, extra=1), tool("add")]
    asked = for_engine(tools=tools, toolChoice=choice)
    assert asked["tools"] == tools, "the template sees them as they were sent"
    assert asked["constraint"] is None


@pytest.mark.parametrize(
    "fields", [{}, {"tools": []}, {"tools": [tool()], "toolChoice": "none"}, {"toolChoice": "none"}]
)
def test_without_tools_the_answer_is_plain(fields: dict[str, Any]) -> None:
    asked = for_engine(**fields)
    assert asked["tools"] == [] and asked["constraint"] is None


def test_required_call_is_one_of_any_tool_and_a_named_one_of_that() -> None:
    tools = [tool(parameters=CITY), tool("add"), tool("any", parameters={})]
    assert for_engine(tools=tools, toolChoice="required")["constraint"] == {
        "kind": "tool_call",
        "field": "tools",
        "functions": [
            {"name": "get_weather", "parameters": CITY, "field": "tools.0.function.parameters"},
            {
                "name": "add",
                "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
                "field": "tools.1.function.parameters",
            },
            {"name": "any", "parameters": {"type": "object"}, "field": "tools.2.function.parameters"},
        ],
    }
    constraint = for_engine(tools=tools, toolChoice=named("add"))["constraint"]
    assert [function["name"] for function in constraint["functions"]] == ["add"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [tool(f"t{i}") for i in range(129)]}, "tools"),
        ({"tools": [tool(), tool()]}, "tools"),
        ({"tools": [{"function": {"name": "a"}}]}, "tools.0.type"),
        ({"tools": [{"type": "retrieval", "function": {"name": "a"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [tool(), tool("")]}, "tools.1.function.name"),
        ({"tools": [tool("a b")]}, "tools.0.function.name"),
        ({"tools": [tool("x" * 65)]}, "tools.0.function.name"),
        ({"tools": [tool(parameters=True)]}, "tools.0.function.parameters"),
        ({"tools": [tool()], "toolChoice": "sometimes"}, "toolChoice"),
        ({"tools": [tool()], "toolChoice": {"type": "function"}}, "toolChoice"),
        ({"tools": [tool()], "toolChoice": named("other")}, "toolChoice"),
        ({"toolChoice": "required"}, "toolChoice"),
        ({"tools": [], "toolChoice": "required"}, "toolChoice"),
        ({"toolChoice": named("get_weather")}, "toolChoice"),
        ({"tools": [tool()], "responseFormat": {"type": "json_object"}}, "tools"),
        ({"tools": [tool()], "toolChoice": "required", "structuredOutputs": {"regex": "a"}}, "tools"),
        ({"tools": [tool(parameters={"description": "x" * 60_000}) for _ in range(5)], "toolChoice": "none"}, "tools"),
    ],
)
def test_malformed_tools_and_choices_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        for_engine(**fields)
    assert raised.value.param == param and raised.value.message.startswith(param)


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
@pytest.mark.parametrize(
    ("function", "place"),
    [
        ({"parameters": {"type": "strin"}}, ".type"),
        ({"parameters": {"properties": {"a": {"minimum": "1"}}}}, ".properties.a.minimum"),
        ({"parameters": {"type": "string"}}, ""),
        ({"parameters": {"type": "object"}, "strict": True}, ""),
    ],
)
def test_parameters_must_be_a_schema_of_an_object(choice: str, function: dict[str, Any], place: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        for_engine(tools=[tool("first"), tool(**function)], toolChoice=choice)
    assert (raised.value.code, raised.value.param) == ("invalid_schema", f"tools.1.function.parameters{place}")


def test_strict_parameters_are_fine() -> None:
    assert for_engine(tools=[tool(parameters=CITY, strict=True)], toolChoice="required")["constraint"]


def test_tools_go_with_a_constraint_once_they_are_switched_off() -> None:
    asked = for_engine(tools=[tool()], toolChoice="none", responseFormat={"type": "json_object"})
    assert asked["constraint"]["kind"] == "json" and asked["tools"] == []
    assert for_engine(tools=[tool()], responseFormat={"type": "text"})["tools"]
