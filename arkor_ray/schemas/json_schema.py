"""JSON Schemas that users send: what is refused before an engine sees them, and how they are walked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from arkor_ray.errors import InvalidRequestError

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64

_ONE = ("items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "contains",
        "propertyNames", "not", "if", "then", "else")  # fmt: skip
_LISTS = ("items", "prefixItems", "allOf", "anyOf", "oneOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def check_schema(schema: dict[str, Any], field: str, *, strict: bool) -> None:
    """Raises InvalidRequestError, code `invalid_schema`, that names `field` and the place in the schema.

    Args:
        schema: validated by the dialect that its `$schema` names, else by draft 2020-12. Whether decoding can enforce it
            is the engine's to say.
        field: where the request has it, in the wire's spelling.
        strict: also that each object schema in it sets additionalProperties to false and requires all its properties.

    Takes up to some tenths of a second for the largest schema.
    """
    _check_size(schema, field)
    _check_validity(schema, field)
    if strict:
        _check_strict(schema, field)


def without_additional_properties(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy in which each schema that lists properties, and says nothing of further ones, forbids them."""
    copied: dict[str, Any] = json.loads(json.dumps(schema))
    for _, part in subschemas(copied):
        if "properties" in part or "patternProperties" in part:
            part.setdefault("additionalProperties", False)
    return copied


def subschemas(schema: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The schema and every schema inside it that is an object, each with its path."""
    yield place, schema
    inner: list[tuple[str, Any]] = [(key, schema.get(key)) for key in _ONE]
    for key in _LISTS:
        value = schema.get(key)
        inner += [(f"{key}.{i}", item) for i, item in enumerate(value if isinstance(value, list) else [])]
    for key in _MAPS:
        value = schema.get(key)
        inner += [(f"{key}.{name}", item) for name, item in (value.items() if isinstance(value, dict) else ())]
    for path, item in inner:
        if isinstance(item, dict):
            yield from subschemas(item, f"{place}.{path}")


def _check_size(schema: dict[str, Any], field: str) -> None:
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA_BYTES:
        raise _refusal(
            field, f"the schema has {size} bytes of JSON, more than the {MAX_SCHEMA_BYTES} allowed; split it"
        )
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [item for part in level for item in _children(part)]
    if level:
        raise _refusal(field, f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep; name parts in $defs")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _check_validity(schema: dict[str, Any], field: str) -> None:
    # Only the server needs it, so that the client can read this module without.
    from jsonschema import Draft202012Validator, FormatChecker
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    dialect = schema.get("$schema")
    validator = validator_for(schema if isinstance(dialect, str) else {}, default=Draft202012Validator)
    try:
        # No formats: a pattern in the engine's dialect need not be one in Python's.
        validator.check_schema(schema, format_checker=FormatChecker(formats=()))
    except SchemaError as error:
        place = ".".join(str(part) for part in error.absolute_path)
        raise _refusal(
            field + "." * bool(place) + place, f"not a valid JSON Schema: {_short(error.message)}"
        ) from error


def _check_strict(schema: dict[str, Any], field: str) -> None:
    for place, part in subschemas(schema, field):
        types = part.get("type")
        if "properties" not in part and types != "object" and not (isinstance(types, list) and "object" in types):
            continue
        if part.get("additionalProperties") is not False:
            raise _refusal(place, "strict is true, so this object schema must set additionalProperties to false")
        required = part.get("required")  # a boolean in draft 3
        missing = sorted(set(part.get("properties", {})) - set(required if isinstance(required, list) else []))
        if missing:
            raise _refusal(
                place,
                f"strict is true, so required must list every property; it lacks {_short(', '.join(missing))}"
                " (an optional value is one whose type may be null)",
            )


def _refusal(field: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {reason}", code="invalid_schema", param=field)


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
