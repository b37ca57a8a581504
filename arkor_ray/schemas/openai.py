"""OpenAI's Chat Completions request, in snake_case, and how it becomes the one chat request that the service knows.

What a field may hold is checked by `ChatRequest`, for both wires alike; this module knows OpenAI's spelling, its older
and newer names of one thing, and what of it would be answered wrongly if it were ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.alias_generators import to_camel

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.base import invalid_request
from arkor_ray.schemas.chat import ChatRequest

# Fields that go on as they are, but for their spelling.
_PASSED = (
    "stream", "temperature", "top_p", "stop", "seed", "logprobs", "top_logprobs", "stream_options", "tools",
    "tool_choice", "response_format", "presence_penalty", "frequency_penalty", "logit_bias", "reasoning_effort",
)  # fmt: skip
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
# To leave these out would give another kind of answer than the one that was asked for.
_REFUSED = {
    "functions": "is no longer supported; send tools",
    "function_call": "is no longer supported; send tool_choice",
    "audio": "is not available; models of this server answer with text",
}


class ChatCompletionRequest(BaseModel):
    """The body of `POST …/v1/chat/completions`. Unknown fields are ignored."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = Field(
        default=None,
        description="A base model of the catalogue, `<jobId>` for a job's final adapter, or `<jobId>:<step>` for one of its "
        "checkpoints. Ignored on an endpoint, whose target decides.",
    )
    messages: list[Any] = Field(description="Turns with a text content, or a list of parts of type `text`.")
    stream: bool = False
    stream_options: dict[str, Any] | None = Field(default=None, description="`include_usage`: usage in a last chunk.")
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = Field(default=None, description="The newer name of max_tokens.")
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int | None = Field(default=None, description="Only 1.")
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = Field(default=None, description="vLLM's: json, regex, choice, grammar.")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    presence_penalty: float | None = Field(default=None, description="Accepted and not applied.")
    frequency_penalty: float | None = Field(default=None, description="Accepted and not applied.")
    logit_bias: dict[str, float] | None = Field(default=None, description="Accepted and not applied.")
    reasoning_effort: str | None = Field(default=None, description="Accepted and not applied.")
    user: str | None = Field(default=None, description="Accepted and not kept.")

    @field_validator("n")
    @classmethod
    def _one_answer(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("must be 1; send the request again for another answer")
        return value

    @model_validator(mode="after")
    def _check(self) -> ChatCompletionRequest:
        extra = self.model_extra or {}
        for name, reason in _REFUSED.items():
            if extra.get(name):
                raise ValueError(f"{name}: {reason}")
        if extra.get("modalities") not in (None, ["text"]):
            raise ValueError("modalities: must be ['text'], the one kind of answer there is")
        if len(given := list(self._constraints())) > 1:
            raise ValueError(f"{given[0]}: give at most one of {', '.join(given)}")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: differs from max_completion_tokens, its newer name; leave it out")
        return self

    def to_chat(self, target: dict[str, Any]) -> ChatRequest:
        """The same request as the arkor wire would have it, checked. To be called within `own_spelling`.

        Args:
            target: `{"baseModel": …}` or `{"adapter": …}`, which nothing in this body decides.
        """
        body: dict[str, Any] = {"messages": [_message(turn, n) for n, turn in enumerate(self.messages)], **target}
        for name, value in self.model_dump(include=set(_PASSED), exclude_none=True).items():
            body[to_camel(name)] = value
        body["maxTokens"] = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        for name, value in self._constraints().items():
            body["structuredOutputs"] = {_GUIDED[name]: value} if name in _GUIDED else value
        try:
            return ChatRequest.model_validate(body)
        except ValidationError as error:
            raise invalid_request(error) from error

    @contextmanager
    def own_spelling(self) -> Iterator[None]:
        """What is raised in here about fields of the arkor wire names them as this body does."""
        spelled = {to_camel(name): name for name in _PASSED}
        spelled["maxTokens"] = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        for name in self._constraints():
            spelled["structuredOutputs"] = name
            if name in _GUIDED:
                spelled[f"structuredOutputs.{_GUIDED[name]}"] = name
        try:
            yield
        except InvalidRequestError as error:
            raise _respelled(error, spelled) from error

    def _constraints(self) -> dict[str, Any]:
        """What of vLLM's constraints is given, by its name: the object of today, or one of the older fields."""
        extra = self.model_extra or {}
        given = {"structured_outputs": self.structured_outputs, **{name: extra.get(name) for name in _GUIDED}}
        return {name: value for name, value in given.items() if value is not None}


def _message(turn: Any, number: int) -> Any:
    """A turn with its text parts joined. What is wrong with it otherwise is for `ChatRequest` to say."""
    if not isinstance(turn, dict):
        return turn
    changed = dict(turn)
    if turn.get("role") == "developer":  # OpenAI's newer name of the system turn, which chat templates do not know
        changed["role"] = "system"
    if isinstance(turn.get("content"), list):
        parts = enumerate(turn["content"])
        changed["content"] = "".join(_text_of(part, f"messages.{number}.content.{n}") for n, part in parts)
    return changed


def _text_of(part: Any, field: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise InvalidRequestError(
            f"{field}.type: must be 'text', the one kind of content that models of this server read (got {kind!r:.80})",
            param=f"{field}.type",
        )
    if not isinstance(part.get("text"), str):
        raise InvalidRequestError(f"{field}.text: must be a string", param=f"{field}.text")
    return str(part["text"])


def _respelled(error: InvalidRequestError, spelled: dict[str, str]) -> InvalidRequestError:
    """The same error with every field of the arkor wire under its name in `spelled`."""
    longest_first = sorted(spelled, key=len, reverse=True)
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})\b")

    def respell(text: str) -> str:
        return pattern.sub(lambda match: spelled[match[0]], text)

    # The value that was sent is shown at the end, and it is not ours to change.
    sentence, shown, value = error.message.partition(" (got ")
    fields = {**error.fields, "param": respell(error.param)} if error.param else error.fields
    return type(error)(respell(sentence) + shown + value, code=error.code, status=error.http_status, **fields)
