"""OpenAI's API for the owner of a token: chat with any model or adapter of his, by its name."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from arkor_ray.api import model_names
from arkor_ray.api.bodies import ModelList, OpenAIErrorBody, OpenAIModel
from arkor_ray.api.completion import ChatTarget, complete
from arkor_ray.api.deps import CallerDep, Services, ServicesDep
from arkor_ray.api.error_handlers import described
from arkor_ray.api.request_body import StrictJsonRoute
from arkor_ray.schemas.openai import ChatCompletionRequest

router = APIRouter(prefix="/v1", tags=["openai"], route_class=StrictJsonRoute, responses=described(OpenAIErrorBody))


@router.post(
    "/chat/completions",
    summary="Generate an answer as OpenAI's API does, streamed if `stream` is true",
    responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}},
    response_class=Response,
)
async def create_chat_completion(
    request: Request, services: ServicesDep, caller: CallerDep, body: ChatCompletionRequest
) -> Response:
    target = await run_in_threadpool(_find_target, services, caller.identity_id, body.model)
    return await complete(request, services, target, body)


@router.get("/models", summary="List the base models, and the newest of your adapters")
def list_models(services: ServicesDep, caller: CallerDep) -> ModelList:
    with services.db.read() as session:
        return model_names.list_models(session, services.settings, caller.identity_id)


@router.get("/models/{model:path}", summary="Get a base model or an adapter of yours by its name")
def get_model(services: ServicesDep, caller: CallerDep, model: str) -> OpenAIModel:
    with services.db.read() as session:
        return model_names.find_model(session, services.settings, caller.identity_id, model)


def _find_target(services: Services, identity_id: str, name: str | None) -> ChatTarget:
    with services.db.read() as session:
        return model_names.find_target(session, services.settings, identity_id, name)
