"""Runs: what an endpoint was asked and what it answered, kept for as long as its owner chose."""

from __future__ import annotations

from typing import Any

from arkor_ray.schemas.base import Timestamp, WireModel


class Run(WireModel):
    """One completed answer. camelCase, with messages, tools and usage as OpenAI spells them."""

    id: str
    endpoint_id: str
    key_id: str | None  # None: the endpoint asked for no key
    model: str
    created_at: Timestamp
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    answer: dict[str, Any]  # the assistant's turn
    finish_reason: str
    usage: dict[str, int]
    latency_ms: int  # from the request to the end of its answer
    first_token_ms: int | None  # from the request to its first token; None if the answer has none
    system_fingerprint: str | None


class ConversationRow(WireModel):
    """A run as a row of a training data set: the prompt, and the answer as its last turn."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
