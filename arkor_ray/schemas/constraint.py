"""What an answer may look like: `responseFormat` in OpenAI's words, `structuredOutputs` in vLLM's.

Both become one constraint for the inference replica, a dict by `kind`:

| kind    | with                                                                              |
| ------- | --------------------------------------------------------------------------------- |
| json    | `schema`; `whitespace`: None for the default, "" for none, else a regex           |
| regex   | `regex`                                                                           |
| choice  | `choice`                                                                          |
| grammar | `grammar`, Lark                                                                   |

and always `field`, the request's field in the wire's spelling, for the errors that only the replica can find.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from arkor_ray.schemas.base import WireModel
from arkor_ray.schemas.json_schema import check_schema, without_additional_properties

MAX_REGEX_LENGTH = 8192
MAX_CHOICES = 1000
MAX_CHOICE_LENGTH = 64 * 1024  # all choices together
MAX_GRAMMAR_LENGTH = 64 * 1024

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
# JSON has these four white space characters only; with any other the answer would not be JSON.
_JSON_WHITESPACE_REGEX = re.compile(r"(?:[ \t\n\r]|\\[tnr]|[\[\]()*+?|]|\{\d+(?:,\d*)?\})*")


class SnakeModel(WireModel):
    """Inside constraints and tools the wire is in snake_case."""

    model_config = ConfigDict(alias_generator=None)


class JsonSchemaFormat(SnakeModel):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(SnakeModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type 'json_schema' needs json_schema with name and schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f"json_schema goes with type 'json_schema', not with {self.type!r}")
        return self

    def constraint(self) -> dict[str, Any] | None:
        """For the replica; None for free text. Raises InvalidRequestError for a schema that is none."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return {"kind": "json", "schema": {"type": "object"}, "whitespace": None, "field": "responseFormat"}
        field = "responseFormat.json_schema.schema"
        check_schema(self.json_schema.schema_, field, strict=bool(self.json_schema.strict))
        return {"kind": "json", "schema": self.json_schema.schema_, "whitespace": None, "field": field}


class StructuredOutputs(SnakeModel):
    """Exactly one of json, regex, choice, grammar and json_object, and how JSON is to be written."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = Field(default=None, min_length=1, max_length=MAX_REGEX_LENGTH)
    choice: list[str] | None = Field(default=None, min_length=1, max_length=MAX_CHOICES)
    grammar: str | None = Field(default=None, max_length=MAX_GRAMMAR_LENGTH)
    json_object: Literal[True] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = Field(default=None, max_length=256)

    @field_validator("choice")
    @classmethod
    def _short_choices(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and sum(map(len, value)) > MAX_CHOICE_LENGTH:
            raise ValueError(f"the choices together have more than {MAX_CHOICE_LENGTH} characters")
        return value

    @field_validator("grammar")
    @classmethod
    def _a_grammar(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("must not be blank; send a Lark grammar whose first rule is `start`")
        if value is not None and "%llguidance" in value:
            raise ValueError("must not contain %llguidance, whose options the server sets")
        return value

    @field_validator("whitespace_pattern")
    @classmethod
    def _json_whitespace(cls, value: str | None) -> str | None:
        if value is not None and not _JSON_WHITESPACE_REGEX.fullmatch(value):
            raise ValueError(
                r"must be a regular expression of space, \t, \n and \r, the only white space of JSON, such as [ \n]{0,2}"
            )
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> StructuredOutputs:
        given = self._given()
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of {', '.join(_KINDS)}; found {found}")
        if given[0] not in ("json", "json_object"):
            for option in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
                if getattr(self, option):
                    raise ValueError(f"{option} goes with json or json_object, not with {given[0]}")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError("disable_any_whitespace and whitespace_pattern contradict each other; give one")
        return self

    def constraint(self) -> dict[str, Any]:
        """For the replica. Raises InvalidRequestError for a schema that is none."""
        kind = self._given()[0]
        field = f"structuredOutputs.{kind}"
        if kind not in ("json", "json_object"):
            return {"kind": kind, kind: getattr(self, kind), "field": field}
        schema = self.json_ if self.json_ is not None else {"type": "object"}
        check_schema(schema, field, strict=False)
        if self.disable_additional_properties:
            schema = without_additional_properties(schema)
        whitespace = "" if self.disable_any_whitespace else self.whitespace_pattern
        return {"kind": "json", "schema": schema, "whitespace": whitespace, "field": field}

    def _given(self) -> list[str]:
        return [kind for kind in _KINDS if getattr(self, "json_" if kind == "json" else kind) is not None]
