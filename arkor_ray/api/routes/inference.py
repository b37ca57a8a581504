"""Chatting with a checkpoint, a final adapter or a base model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from arkor_ray.api.chat_answer import ChatAnswer
from arkor_ray.api.completion import ChatTarget
from arkor_ray.api.deps import ScopeDep, Services, ServicesDep
from arkor_ray.api.disconnect import unless_gone
from arkor_ray.api.request_body import StrictJsonRoute
from arkor_ray.api.sse import EventStream
from arkor_ray.errors import ModelError
from arkor_ray.jobs import service
from arkor_ray.schemas.chat import ChatRequest

router = APIRouter(prefix="/v1/inference", tags=["inference"], route_class=StrictJsonRoute)


@router.post(
    "/chat",
    summary="Generate an answer, streamed unless `stream` is false",
    responses={200: {"content": {"text/event-stream": {}, "application/json": {}}}},
    response_class=Response,
)
async def chat(request: Request, services: ServicesDep, scope: ScopeDep, body: ChatRequest) -> Response:
    asked = await run_in_threadpool(body.for_engine)
    target = await run_in_threadpool(_find_target, services, scope.project.id, body)
    items = services.inference.chat(target.base_model, target.base_precision, asked, target.adapter_id)
    answer = await unless_gone(request.receive, ChatAnswer.begin(target.model, items))
    if body.stream:
        return EventStream(answer.chunks(include_usage=_include_usage(body.stream_options)))
    return JSONResponse(await unless_gone(request.receive, answer.whole()))


def _find_target(services: Services, project_id: str, body: ChatRequest) -> ChatTarget:
    if body.adapter is not None:
        with services.db.read() as session:
            job, row = service.find_adapter(session, project_id, body.adapter)
        return ChatTarget(str(job.config["model"]), row.base_model, row.base_precision, row.adapter_id)
    assert body.base_model is not None
    try:
        return ChatTarget(body.base_model, services.settings.resolve_model(body.base_model), None, None)
    except ModelError as error:
        raise ModelError(error.message, param="baseModel") from error


def _include_usage(options: dict[str, Any] | None) -> bool:
    return bool(options and (options.get("includeUsage") or options.get("include_usage")))
