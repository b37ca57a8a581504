"""The public route of endpoints: OpenAI's API at `/e/<slug>/v1`, opened by the endpoint's own keys or by nothing at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from arkor_ray.api.bodies import OpenAIErrorBody, OpenAIModel, OpenAIModelList
from arkor_ray.api.completion import ChatTarget, complete
from arkor_ray.api.deps import ServicesDep
from arkor_ray.api.endpoint_directory import ServedEndpoint
from arkor_ray.api.error_handlers import described
from arkor_ray.api.request_body import StrictJsonRoute
from arkor_ray.api.run_recorder import RunRecorder
from arkor_ray.schemas.openai import ChatCompletionRequest

router = APIRouter(
    prefix="/e/{slug}/v1", tags=["public endpoints"], route_class=StrictJsonRoute, responses=described(OpenAIErrorBody)
)

_bearer = HTTPBearer(scheme_name="EndpointKey", auto_error=False, description="A key of the endpoint.")
_api_key = APIKeyHeader(name="x-api-key", auto_error=False, description="The same, where Authorization is taken.")


@dataclass(frozen=True)
class Access:
    """An endpoint that the request may use. `key_id` is None where it asks for no key."""

    endpoint: ServedEndpoint
    key_id: str | None


async def access(
    services: ServicesDep,
    slug: str,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    api_key: Annotated[str | None, Depends(_api_key)],
) -> Access:
    """404 for a slug that is unknown or disabled, 401 without one of the endpoint's keys."""
    endpoint = await services.endpoints.find(slug)
    # OpenAI's clients always send an Authorization, if only a dummy one; x-api-key is sent on purpose.
    key = api_key or (bearer.credentials if bearer else None)
    return Access(endpoint, services.endpoints.authorize(endpoint, key))


AccessDep = Annotated[Access, Depends(access)]


@router.post(
    "/chat/completions",
    summary="Generate an answer of the endpoint's model; `model` in the body is ignored",
    responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}},
    response_class=Response,
)
async def create_endpoint_chat_completion(
    request: Request, services: ServicesDep, access: AccessDep, body: ChatCompletionRequest
) -> Response:
    endpoint = access.endpoint
    target = ChatTarget(endpoint.model, endpoint.base_model, endpoint.base_precision, endpoint.adapter_id)
    recorder = None
    if endpoint.run_retention_mode != "disabled":
        recorder = RunRecorder(services.runs, endpoint, access.key_id, len(await request.body()))
    return await complete(request, services, target, body, recorder)


@router.get("/models", summary="List the one model that the endpoint is")
async def list_endpoint_models(access: AccessDep) -> OpenAIModelList:
    return OpenAIModelList(data=[_model(access.endpoint)])


def _model(endpoint: ServedEndpoint) -> OpenAIModel:
    return OpenAIModel(id=endpoint.model, created=int(endpoint.created_at.timestamp()), owned_by=endpoint.slug)
