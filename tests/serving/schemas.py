"""JSON Schemas as users send them: those that decoding can enforce, and those it must refuse."""

from __future__ import annotations

from typing import Any

TICKET = ["category", "urgency", "summary", "nextAction"]


def strict(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


INTEGER, SHORT = {"type": "integer"}, {"type": "string", "maxLength": 8}
SCHEMAS: dict[str, dict[str, Any]] = {
    "anything": {},
    "any object": {"type": "object"},
    "triage": strict({name: {"type": "string"} for name in TICKET}),
    "triage with an enum": strict({"urgency": {"enum": ["low", "medium", "high"]}, "summary": SHORT}),
    "optional properties": {"type": "object", "properties": {"a": INTEGER, "b": SHORT}, "required": ["b"]},
    "names that need escapes": strict({'a"b': INTEGER, "é\\": {"type": "null"}}),
    "further properties of a type": {"properties": {"a": SHORT}, "additionalProperties": INTEGER},
    "properties by pattern": {
        "type": "object", "properties": {"b": {"type": "boolean"}}, "patternProperties": {"^a": INTEGER},
        "additionalProperties": False,
    },
    "count of properties": {"type": "object", "minProperties": 1, "maxProperties": 2},
    "nested": strict({"a": strict({"b": strict({"c": {"type": "array", "items": strict({"d": INTEGER}), "maxItems": 2}})})}),
    "array bounds": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [INTEGER, {"type": "boolean"}], "items": False},
    "tuple of draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [INTEGER, SHORT],
        "additionalItems": False,
    },
    "string bounds": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[a-c]{2}\\d$"},
    "pattern and length": {"type": "string", "pattern": "^[a-z]+$", "minLength": 3, "maxLength": 4},
    "integer bounds": {"type": "integer", "minimum": -3, "exclusiveMaximum": 12},
    "number bounds": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 2.25},
    "exclusive bound of draft 4": {
        "$schema": "http://json-schema.org/draft-04/schema#", "type": "integer", "minimum": 1, "exclusiveMinimum": True,
        "maximum": 3,
    },
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 5000},
    "constant": {"const": {"a": 'b"\\é😀', "c": [1, None]}},
    "enum of many types": {"enum": [1, "a", None, True, {"a": [1]}, [2, "x"]]},
    "types": {"type": ["integer", "null", "boolean"]},
    "anyOf": {"anyOf": [INTEGER, SHORT, strict({"a": INTEGER})]},
    "oneOf told apart": {"oneOf": [INTEGER, SHORT]},
    "allOf": {"allOf": [{"properties": {"a": INTEGER}, "required": ["a"]}, {"properties": {"b": SHORT}, "required": ["b"]}],
              "type": "object"},
    "reference with a sibling": {"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": {"type": "integer", "maximum": 9}}},
    "recursion": {
        "$ref": "#/$defs/node", "$defs": {"node": strict({"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}})},
    },
    **{f"format {name}": {"type": "string", "format": name}
       for name in ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")},
}  # fmt: skip

UNSUPPORTED: dict[str, dict[str, Any]] = {
    "not": {"not": INTEGER},
    "if": {"if": INTEGER, "then": {}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": INTEGER},
    "propertyNames": {"type": "object", "propertyNames": SHORT},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "overlapping oneOf": {"oneOf": [INTEGER, {"type": "number"}]},
    "format": {"type": "string", "format": "idn-hostname"},
    "look-around": {"type": "string", "pattern": "(?=a)b"},
    "broken pattern": {"type": "string", "pattern": "("},
    "remote reference": {"$ref": "https://example.com/schema"},
    "reference to nothing": {"$ref": "#/$defs/a"},
    "nothing satisfies it": {"type": "integer", "minimum": 5, "maximum": 2},
    "leniency that the schema asks for": {"not": INTEGER, "x-guidance": {"lenient": True}},
}
