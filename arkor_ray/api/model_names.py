"""What OpenAI's clients call a model, for the owner of a token: a base model, a job's final adapter, or a checkpoint."""

from __future__ import annotations

import re

from sqlalchemy.orm import Session

from arkor_ray.api.bodies import Model, ModelList, OpenAIModel
from arkor_ray.api.completion import ChatTarget
from arkor_ray.db import checkpoints
from arkor_ray.errors import ConflictError, GoneError, InvalidRequestError, ModelError, NotFoundError
from arkor_ray.jobs import service
from arkor_ray.schemas.chat import CheckpointAdapter, FinalAdapter
from arkor_ray.settings import Settings

_ADAPTER = re.compile(r"(?P<job_id>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?::(?P<step>[0-9]{1,18}))?")
LISTED_ADAPTERS = 100
OWNER = "arkor-ray"


def find_target(session: Session, settings: Settings, identity_id: str, name: str | None) -> ChatTarget:
    """Exactly the weights that `name` stands for, in any organisation of the caller.

    Raises NotFoundError with the code `model_not_found`, for what belongs to others as for what never was, and
    ConflictError for the final adapter of a job that has not ended, GoneError for an adapter that was removed.
    """
    if name is None:
        raise InvalidRequestError("model: is missing; GET /v1/models lists what there is", param="model")
    adapter = _adapter(name)
    try:
        return ChatTarget(name, settings.resolve_model(name), None, None)
    except ModelError as error:
        if adapter is None:
            raise _not_found(error.message) from error
    try:
        job = service.find_as_member(session, identity_id, adapter.job_id)
        _, row = service.find_adapter(session, job.project_id, adapter)
    except NotFoundError as error:
        raise _not_found(f"model {name!r}: {error.message}") from error
    except (ConflictError, GoneError) as error:
        raise type(error)(f"model {name!r}: {error.message}", param="model") from error
    return ChatTarget(name, row.base_model, row.base_precision, row.adapter_id)


def list_models(session: Session, settings: Settings, identity_id: str) -> ModelList:
    """The catalogue, and of the caller's adapters the newest `LISTED_ADAPTERS`; older ones answer by name as well."""
    names = settings.model_names()
    adapters = [
        OpenAIModel(
            id=row.job_id if row.final else f"{row.job_id}:{row.step}",
            created=int(row.created_at.timestamp()),
            owned_by=org_slug,
        )
        for row, org_slug in checkpoints.newest_of_member(session, identity_id, LISTED_ADAPTERS)
    ]
    return ModelList(data=[*map(base_model, names), *adapters], models=[Model(name=name) for name in names])


def find_model(session: Session, settings: Settings, identity_id: str, name: str) -> OpenAIModel:
    """One entry of the list, also of an adapter too old for it. Raises as `find_target`."""
    target = find_target(session, settings, identity_id, name)
    if target.adapter_id is None:
        return base_model(name)
    row, org_slug = checkpoints.with_org(session, target.adapter_id)
    return OpenAIModel(id=name, created=int(row.created_at.timestamp()), owned_by=org_slug)


def base_model(name: str) -> OpenAIModel:
    return OpenAIModel(id=name, created=0, owned_by=OWNER)


def _adapter(name: str) -> FinalAdapter | CheckpointAdapter | None:
    match = _ADAPTER.fullmatch(name)
    if match is None:
        return None
    if match["step"] is None:
        return FinalAdapter(kind="final", job_id=match["job_id"])
    return CheckpointAdapter(kind="checkpoint", job_id=match["job_id"], step=int(match["step"]))


def _not_found(message: str) -> NotFoundError:
    return NotFoundError(message, code="model_not_found", param="model")
