"""Inference: what may be asked of an adapter or a base model. camelCase on the arkor route, snake_case inside messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from arkor_ray.schemas.base import WireModel
from arkor_ray.schemas.constraint import ResponseFormat, StructuredOutputs
from arkor_ray.schemas.tool import MAX_TOOLS, Tool, ToolChoice, check_choice, check_parameters, forced_call

MAX_STOP_LENGTH = 1024


class Message(WireModel):
    """One turn. Unknown keys, such as the Playground's numeric `id`, are kept out of the prompt."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = Field(default=None, alias="tool_calls")
    tool_call_id: str | None = Field(default=None, alias="tool_call_id")

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.role == "assistant":
            if self.content is None and not self.tool_calls:
                raise ValueError("an assistant message needs a string content or a non-empty tool_calls")
        elif self.content is None:
            raise ValueError(f"a {self.role} message needs a string content")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool message needs tool_call_id")
        return self

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees."""
        kept = {
            "role": self.role,
            "content": self.content,
            "tool_calls": self.tool_calls,
            "tool_call_id": self.tool_call_id,
        }
        return {k: v for k, v in kept.items() if v is not None}


class FinalAdapter(WireModel):
    kind: Literal["final"]
    job_id: str


class CheckpointAdapter(WireModel):
    kind: Literal["checkpoint"]
    job_id: str
    step: int = Field(ge=0)


AdapterTarget = Annotated[FinalAdapter | CheckpointAdapter, Field(discriminator="kind")]


def _stop(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ChatRequest(WireModel):
    """The arkor wire's inference body. Exactly one of `adapter` and `base_model`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    adapter: AdapterTarget | None = None
    base_model: str | None = None
    stream: bool = True
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: Annotated[list[str] | None, BeforeValidator(_stop)] = Field(default=None, max_length=16)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream_options: dict[str, Any] | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @field_validator("stop", mode="after")
    @classmethod
    def _no_empty_stop(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and any(not text for text in value):
            raise ValueError("must not contain an empty string")
        if value is not None and any(len(text) > MAX_STOP_LENGTH for text in value):
            raise ValueError(f"a stop text may have {MAX_STOP_LENGTH} characters at most")
        return value

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if (self.adapter is None) == (self.base_model is None):
            raise ValueError("adapter, baseModel: give exactly one of the two")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("topLogprobs needs logprobs true")
        if self.structured_outputs is not None and self.response_format and self.response_format.type != "text":
            raise ValueError(
                f"structuredOutputs: cannot go with a responseFormat of type {self.response_format.type!r}; give one of the two"
            )
        check_choice(self.tools or [], self.tool_choice)
        constrained = self.structured_outputs or (self.response_format and self.response_format.type != "text")
        if self._active_tools and constrained:
            raise ValueError(
                "tools: an answer cannot be a call and keep to responseFormat or structuredOutputs; leave out one of them, "
                "or send toolChoice 'none'"
            )
        return self

    def for_engine(self) -> dict[str, Any]:
        """The part that the inference replica sees, in snake_case. `constraint` is as `schemas.constraint` and
        `schemas.tool` have it; `tools` are those that the model may call.

        Raises InvalidRequestError for a JSON Schema that is none. Checking a large one takes time: call this in a thread.
        """
        check_parameters(self.tools or [])
        return {
            "messages": [message.for_template() for message in self.messages],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "stop": self.stop or [],
            "seed": self.seed,
            "tools": [tool.model_dump(mode="json", exclude_unset=True) for tool in self._active_tools],
            "constraint": self._constraint(),
        }

    @property
    def _active_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools or []

    def _constraint(self) -> dict[str, Any] | None:
        if self._active_tools:
            return forced_call(self._active_tools, self.tool_choice)
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint()
        return None if self.response_format is None else self.response_format.constraint()
