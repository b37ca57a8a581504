"""Answering a chat request whose target is known: the last step that every route for chats ends in."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from arkor_ray.api.chat_answer import ChatAnswer
from arkor_ray.api.deps import Services
from arkor_ray.api.disconnect import unless_gone
from arkor_ray.api.sse import COMMENT_FRAME, EventStream
from arkor_ray.schemas.chat import ChatRequest

Items = AsyncGenerator[dict[str, Any]]


@dataclass(frozen=True)
class ChatTarget:
    """What answers. `model` is the name that the answer carries."""

    model: str
    base_model: str
    base_precision: str | None
    adapter_id: str | None


async def complete(
    request: Request,
    services: Services,
    target: ChatTarget,
    chat: ChatRequest,
    watch: Callable[[Items], Items] | None = None,
) -> Response:
    """OpenAI's answer, whole or streamed as `chat` says. The client's leaving cancels it.

    Args:
        watch: sees the items of `InferenceGateway.chat` on their way to the answer.
    """
    items = services.inference.chat(target.base_model, target.base_precision, chat.for_engine(), target.adapter_id)
    answer = await unless_gone(request.receive, ChatAnswer.begin(target.model, watch(items) if watch else items))
    if chat.stream:
        include_usage = bool((chat.stream_options or {}).get("include_usage"))
        # OpenAI's clients take every frame with data for a chunk.
        return EventStream(answer.chunks(include_usage=include_usage), ping=COMMENT_FRAME)
    whole = await unless_gone(request.receive, answer.whole())
    whole.pop("content", None)  # of the arkor wire alone
    return JSONResponse(whole)
