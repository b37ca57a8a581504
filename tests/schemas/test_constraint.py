"""What a request may ask of its answer: each rule of the contract, told by the field that breaks it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.base import invalid_request
from arkor_ray.schemas.chat import ChatRequest
from arkor_ray.schemas.json_schema import MAX_SCHEMA_BYTES, check_schema, without_additional_properties

STRICT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


def constraint(**fields: Any) -> dict[str, Any] | None:
    """What the replica gets; raises as the server does."""
    body = {"messages": [{"role": "user", "content": "hi"}], "baseModel": "tiny", **fields}
    try:
        return ChatRequest.model_validate(body).for_engine()["constraint"]
    except ValidationError as error:
        raise invalid_request(error) from error


def json_schema(schema: Any, **extra: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **extra}}


def refused(**fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as raised:
        constraint(**fields)
    assert raised.value.param and raised.value.message.startswith(raised.value.param)
    return raised.value


def test_free_text_has_no_constraint() -> None:
    assert constraint() is None
    assert constraint(responseFormat={"type": "text"}) is None


def test_response_format_becomes_a_json_constraint() -> None:
    assert constraint(responseFormat={"type": "json_object"}) == {
        "kind": "json", "schema": {"type": "object"}, "whitespace": None, "field": "responseFormat",
    }  # fmt: skip
    assert constraint(responseFormat=json_schema(STRICT, strict=True, description="d")) == {
        "kind": "json", "schema": STRICT, "whitespace": None, "field": "responseFormat.json_schema.schema",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"regex": "a+"}, {"kind": "regex", "regex": "a+", "field": "structuredOutputs.regex"}),
        ({"choice": ["", "b"]}, {"kind": "choice", "choice": ["", "b"], "field": "structuredOutputs.choice"}),
        (
            {"grammar": 'start: "a"'},
            {"kind": "grammar", "grammar": 'start: "a"', "field": "structuredOutputs.grammar"},
        ),
        (
            {"json_object": True, "disable_any_whitespace": True},
            {"kind": "json", "schema": {"type": "object"}, "whitespace": "", "field": "structuredOutputs.json_object"},
        ),
        (
            {"json": STRICT, "whitespace_pattern": r"[ \n]{0,2}", "regex": None},
            {"kind": "json", "schema": STRICT, "whitespace": r"[ \n]{0,2}", "field": "structuredOutputs.json"},
        ),
    ],
)
def test_structured_outputs_become_one_constraint(asked: dict[str, Any], found: dict[str, Any]) -> None:
    assert constraint(structuredOutputs=asked) == found
    assert constraint(structuredOutputs=asked, responseFormat={"type": "text"}) == found


@pytest.mark.parametrize(
    ("format", "param"),
    [
        ({}, "responseFormat.type"),
        ({"type": "yaml"}, "responseFormat.type"),
        ("json_object", "responseFormat"),
        ({"type": "json_schema"}, "responseFormat"),
        ({"type": "json_object", "json_schema": {"name": "a", "schema": {}}}, "responseFormat"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "responseFormat.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "", "schema": {}}}, "responseFormat.json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "responseFormat.json_schema.schema"),
        (json_schema(True), "responseFormat.json_schema.schema"),
        (json_schema("{}"), "responseFormat.json_schema.schema"),
    ],
)
def test_malformed_response_format_is_refused(format: Any, param: str) -> None:
    assert refused(responseFormat=format).param == param


@pytest.mark.parametrize(
    ("outputs", "param", "said"),
    [
        ({}, "structuredOutputs", "exactly one"),
        ({"disable_any_whitespace": True}, "structuredOutputs", "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "structuredOutputs", "regex and choice"),
        ({"json": {}, "json_object": True}, "structuredOutputs", "json and json_object"),
        ({"json": "{}"}, "structuredOutputs.json", "dict"),
        ({"json_object": False}, "structuredOutputs.json_object", "True"),
        ({"regex": ""}, "structuredOutputs.regex", ""),
        ({"regex": "a" * 10_000}, "structuredOutputs.regex", "8192"),
        ({"choice": []}, "structuredOutputs.choice", ""),
        ({"choice": ["a"] * 1001}, "structuredOutputs.choice", "1000"),
        ({"choice": ["a" * 70_000]}, "structuredOutputs.choice", "65536"),
        ({"choice": [1]}, "structuredOutputs.choice.0", "string"),
        ({"grammar": " \n"}, "structuredOutputs.grammar", "Lark"),
        ({"grammar": '%llguidance {}\nstart: "a"'}, "structuredOutputs.grammar", "%llguidance"),
        ({"grammar": "x" * 70_000}, "structuredOutputs.grammar", "65536"),
        ({"json": {}, "whitespace_pattern": r"\s*"}, "structuredOutputs.whitespace_pattern", "white space of JSON"),
        ({"json": {}, "whitespace_pattern": "x"}, "structuredOutputs.whitespace_pattern", "white space of JSON"),
        ({"regex": "a", "whitespace_pattern": " "}, "structuredOutputs", "not with regex"),
        ({"choice": ["a"], "disable_any_whitespace": True}, "structuredOutputs", "not with choice"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "structuredOutputs", "give one"),
    ],
)
def test_malformed_structured_outputs_are_refused(outputs: Any, param: str, said: str) -> None:
    error = refused(structuredOutputs=outputs)
    assert error.param == param and said in error.message


@pytest.mark.parametrize("format", [{"type": "json_object"}, json_schema(STRICT)])
def test_two_constraints_contradict_each_other(format: Any) -> None:
    error = refused(structuredOutputs={"regex": "a"}, responseFormat=format)
    assert error.param == "structuredOutputs" and "responseFormat" in error.message


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "strin"}, "type"),
        ({"properties": []}, "properties"),
        ({"properties": {"a": {"items": {"minimum": "3"}}}}, "properties.a.items.minimum"),
        ({"items": [{"type": "integer"}]}, "items"),  # a tuple is written with prefixItems since 2020-12
        ({"$schema": "https://example.com/unknown", "required": "a"}, "required"),
        ({"$schema": 3}, "$schema"),
    ],
)
def test_schema_that_is_none_is_refused_where_it_goes_wrong(schema: Any, place: str) -> None:
    for fields, field in (
        ({"responseFormat": json_schema(schema)}, "responseFormat.json_schema.schema"),
        ({"structuredOutputs": {"json": schema}}, "structuredOutputs.json"),
    ):
        error = refused(**fields)
        assert (error.code, error.param) == ("invalid_schema", f"{field}.{place}")


def test_dialect_is_the_one_that_the_schema_names() -> None:
    draft4 = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 1, "exclusiveMinimum": True}
    check_schema(draft4, "f", strict=False)
    with pytest.raises(InvalidRequestError, match="exclusiveMinimum"):
        check_schema({**draft4, "$schema": "https://json-schema.org/draft/2020-12/schema"}, "f", strict=False)


def test_pattern_is_judged_by_the_engine_that_matches_it() -> None:
    check_schema({"pattern": r"^\p{Lu}+$"}, "f", strict=True)


@pytest.mark.parametrize(
    ("schema", "place", "said"),
    [
        ({"type": "object"}, "", "additionalProperties"),
        ({**STRICT, "additionalProperties": True}, "", "additionalProperties"),
        ({**STRICT, "required": []}, "", "lacks a"),
        ({"type": ["object", "null"]}, "", "additionalProperties"),
        ({"properties": {}}, "", "additionalProperties"),
        ({"type": "array", "items": {"type": "object"}}, ".items", "additionalProperties"),
        ({"anyOf": [{"type": "string"}, {"type": "object"}]}, ".anyOf.1", "additionalProperties"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}}, ".$defs.x", "additionalProperties"),
        (
            {**STRICT, "properties": {"a": {**STRICT, "properties": {"a": {}, "b": {}}}}},
            ".properties.a",
            "lacks b",
        ),
    ],
)
def test_strict_asks_each_object_schema_for_all_it_may_have(schema: Any, place: str, said: str) -> None:
    error = refused(responseFormat=json_schema(schema, strict=True))
    assert (error.code, error.param) == ("invalid_schema", f"responseFormat.json_schema.schema{place}")
    assert said in error.message
    assert constraint(responseFormat=json_schema(schema, strict=False)) is not None


def test_strict_leaves_data_alone() -> None:
    schema = {"enum": [{"type": "object", "properties": {"a": 1}}], "default": {"type": "object"}}
    check_schema({**STRICT, "properties": {"a": schema}}, "f", strict=True)


def test_enormous_schemas_are_refused() -> None:
    error = refused(structuredOutputs={"json": {"description": "x" * MAX_SCHEMA_BYTES}})
    assert error.code == "invalid_schema" and str(MAX_SCHEMA_BYTES) in error.message
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"properties": {"a": deep}}
    assert "deep" in refused(structuredOutputs={"json": deep}).message


def test_deepest_and_largest_schemas_that_are_allowed_can_be_checked() -> None:
    deep: dict[str, Any] = {}
    for _ in range(31):
        deep = {"properties": {"a": deep}}
    check_schema(deep, "f", strict=False)
    wide = {"properties": {f"p{i}": {"type": "string", "description": "d" * 20} for i in range(850)}}
    check_schema(wide, "f", strict=False)


def test_additional_properties_are_forbidden_where_nothing_was_said_of_them() -> None:
    schema = {
        "properties": {"a": {"properties": {"b": {}}}, "c": {"properties": {}, "additionalProperties": True}},
        "const": {"properties": {}},
        "items": {"type": "object"},
    }
    closed = without_additional_properties(schema)
    assert closed["additionalProperties"] is closed["properties"]["a"]["additionalProperties"] is False
    assert closed["properties"]["c"]["additionalProperties"] is True
    assert closed["const"] == {"properties": {}} and closed["items"] == {"type": "object"}
    assert "additionalProperties" not in schema, "the caller's schema is left as it was"
    found = constraint(structuredOutputs={"json": schema, "disable_additional_properties": True})
    assert found is not None and found["schema"] == closed
