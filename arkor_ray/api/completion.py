"""Answering OpenAI's chat request once it is known what answers it."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from arkor_ray.api.chat_answer import ChatAnswer
from arkor_ray.api.deps import Services
from arkor_ray.api.disconnect import unless_gone
from arkor_ray.api.run_recorder import RunRecorder
from arkor_ray.api.sse import COMMENT_FRAME, EventStream
from arkor_ray.schemas.openai import ChatCompletionRequest


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
    body: ChatCompletionRequest,
    recorder: RunRecorder | None = None,
) -> Response:
    """The answer to `body`, whole or streamed as it says. The client's leaving cancels it."""
    with body.own_spelling():
        chat = body.to_chat({"baseModel": target.model})
        asked = await run_in_threadpool(chat.for_engine)  # where large JSON Schemas are checked
        items = services.inference.chat(target.base_model, target.base_precision, asked, target.adapter_id)
        if recorder is not None:
            items = recorder.watch(asked, items)
        answer = await unless_gone(request.receive, ChatAnswer.begin(target.model, items))
        if chat.stream:
            include_usage = bool((chat.stream_options or {}).get("include_usage"))
            # OpenAI's clients take every frame with data for a chunk.
            return EventStream(answer.chunks(include_usage=include_usage), ping=COMMENT_FRAME)
        whole = await unless_gone(request.receive, answer.whole())
    whole.pop("content", None)  # of the arkor wire alone
    return JSONResponse(whole)
