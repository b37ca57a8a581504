"""The base models that jobs and chats may name."""

from __future__ import annotations

from fastapi import APIRouter

from arkor_ray.api.bodies import Model, ModelList
from arkor_ray.api.deps import CallerDep, ServicesDep

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", summary="List the names in this server's catalogue")
def list_models(services: ServicesDep, _: CallerDep) -> ModelList:
    return ModelList(models=[Model(name=name) for name in services.settings.model_names()])
