"""Tools a model may call, and whether it must: `tools` and `toolChoice`, in OpenAI's words."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.constraint import SnakeModel
from arkor_ray.schemas.json_schema import check_schema

MAX_TOOLS = 128
MAX_PARAMETERS_BYTES = 256 * 1024  # of all tools together
NAME_PATTERN = r"^[a-zA-Z0-9_.-]{1,64}$"

#: OpenAI's meaning of a function that says nothing of its parameters.
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class FunctionDefinition(SnakeModel):
    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def schema_of_arguments(self) -> dict[str, Any]:
        return {"type": "object", **(_NO_PARAMETERS if self.parameters is None else self.parameters)}


class Tool(SnakeModel):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(SnakeModel):
    name: str = Field(min_length=1)


class NamedToolChoice(SnakeModel):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["auto", "none", "required"] | NamedToolChoice


def check_choice(tools: list[Tool], choice: ToolChoice | None) -> None:
    """Raises ValueError when the two do not go together."""
    names = [tool.function.name for tool in tools]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tools: the name {twice[0]!r} is there twice")
    if choice == "required" and not tools:
        raise ValueError("toolChoice: 'required' needs tools")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        listed = ", ".join(names) or "there are none"
        raise ValueError(f"toolChoice: no tool is named {choice.function.name!r} (tools: {listed})")


def check_parameters(tools: list[Tool]) -> None:
    """Raises InvalidRequestError unless each tool's parameters are a JSON Schema of an object."""
    size = sum(len(json.dumps(tool.function.parameters)) for tool in tools)
    if size > MAX_PARAMETERS_BYTES:
        raise InvalidRequestError(
            f"tools: their parameters together have {size} bytes of JSON, more than the {MAX_PARAMETERS_BYTES} allowed",
            param="tools",
        )
    for i, tool in enumerate(tools):
        schema = tool.function.parameters
        if schema is None:
            continue
        check_schema(schema, _field(i), strict=bool(tool.function.strict))
        if schema.get("type", "object") != "object":
            raise InvalidRequestError(
                f"{_field(i)}: arguments are an object, so type must be 'object', not {schema['type']!r}",
                code="invalid_schema",
                param=_field(i),
            )


def forced_call(tools: list[Tool], choice: ToolChoice | None) -> dict[str, Any] | None:
    """The constraint of an answer that must be a call; None where the model may choose."""
    if choice == "required":
        wanted = None
    elif isinstance(choice, NamedToolChoice):
        wanted = choice.function.name
    else:
        return None
    functions = [
        {"name": tool.function.name, "parameters": tool.function.schema_of_arguments(), "field": _field(i)}
        for i, tool in enumerate(tools)
        if wanted in (None, tool.function.name)
    ]
    return {"kind": "tool_call", "functions": functions, "field": "tools"}


def _field(index: int) -> str:
    return f"tools.{index}.function.parameters"
