"""Publishing: what an endpoint may serve, and in which order its pointer moves.

Serving has what an endpoint shall serve before a request can ask for it. So a change of the target, and switching an
endpoint on, first has the replica load it; only then is the row written. Requests in flight keep what they began with.
Loading takes its time and happens outside any transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from arkor_ray.api.deps import ProjectScope, Services
from arkor_ray.db import endpoints
from arkor_ray.db.tables import EndpointKeyRow, EndpointRow
from arkor_ray.errors import ConflictError, GoneError, ModelError, NotFoundError
from arkor_ray.jobs import service as jobs
from arkor_ray.schemas.checkpoint import CheckpointManifest
from arkor_ray.schemas.endpoint import (
    Endpoint,
    EndpointCreate,
    EndpointKey,
    EndpointPatch,
    EndpointTarget,
    IssuedEndpointKey,
    ServedAdapter,
    ServedBaseModel,
)
from arkor_ray.settings import Settings

_TARGET: TypeAdapter[ServedAdapter | ServedBaseModel] = TypeAdapter(EndpointTarget)


async def create(services: Services, scope: ProjectScope, body: EndpointCreate) -> Endpoint:
    """A new, enabled endpoint.

    Raises ConflictError when the slug is taken or the job has no final adapter yet, NotFoundError for an adapter that
    this project does not have, ModelError for a base model that is not in the catalogue, AdapterError for an adapter
    that serving refuses, ServiceUnavailableError when nobody can serve now.
    """

    def check() -> _Resolved:
        with services.db.read() as session:
            endpoints.refuse_taken(session, body.slug)
            return _resolve(session, services.settings, scope.project.id, body.target)

    def write(resolved: _Resolved) -> Endpoint:
        with services.db.write() as session:
            row = endpoints.create(
                session,
                org_id=scope.org.id,
                project_id=scope.project.id,
                slug=body.slug,
                auth_mode=body.auth_mode,
                retention=body.retention,
                **resolved.columns,
            )
        services.endpoints.invalidate(row.slug)
        return _to_wire(services.settings, row)

    resolved = await run_in_threadpool(check)
    await _prepare(services, resolved)
    return await run_in_threadpool(write, resolved)


async def update(services: Services, scope: ProjectScope, endpoint_id: str, body: EndpointPatch) -> Endpoint:
    """Changes what `body` names. Raises what `create` does, and NotFoundError for the endpoint; then nothing changed."""

    def check() -> _Resolved | None:
        """What serving must have first."""
        with services.db.read() as session:
            row = endpoints.get(session, scope.project.id, endpoint_id)
            if body.target is not None:
                return _resolve(session, services.settings, scope.project.id, body.target)
            if body.enabled and not row.enabled:
                return _resolve(session, services.settings, scope.project.id, _TARGET.validate_python(row.target))
            return None

    def write(resolved: _Resolved | None) -> Endpoint:
        values: dict[str, Any] = {}
        if body.target is not None and resolved is not None:
            values |= resolved.columns
        if body.auth_mode is not None:
            values["auth_mode"] = body.auth_mode
        if body.enabled is not None:
            values["enabled"] = body.enabled
        if body.run_retention_mode is not None:
            values |= {"run_retention_mode": body.run_retention_mode, "run_retention_days": body.run_retention_days}
        with services.db.write() as session:
            row = endpoints.change(session, scope.project.id, endpoint_id, **values)
        services.endpoints.invalidate(row.slug)
        return _to_wire(services.settings, row)

    resolved = await run_in_threadpool(check)
    if resolved is not None:
        await _prepare(services, resolved)
    return await run_in_threadpool(write, resolved)


def get(services: Services, scope: ProjectScope, endpoint_id: str) -> Endpoint:
    """Raises NotFoundError, as everything here that takes an endpoint's id."""
    with services.db.read() as session:
        return _to_wire(services.settings, endpoints.get(session, scope.project.id, endpoint_id))


def list_endpoints(services: Services, scope: ProjectScope) -> list[Endpoint]:
    """All endpoints of the project, newest first."""
    with services.db.read() as session:
        return [_to_wire(services.settings, row) for row in endpoints.list_endpoints(session, scope.project.id)]


def delete(services: Services, scope: ProjectScope, endpoint_id: str) -> None:
    """With its keys; the slug is free afterwards."""
    with services.db.write() as session:
        row = endpoints.delete(session, scope.project.id, endpoint_id)
    services.endpoints.invalidate(row.slug)


def create_key(services: Services, scope: ProjectScope, endpoint_id: str, label: str) -> IssuedEndpointKey:
    with services.db.write() as session:
        issued = endpoints.create_key(session, scope.project.id, endpoint_id, label)
    services.endpoints.invalidate(issued.endpoint.slug)
    key = issued.row
    return IssuedEndpointKey(
        id=key.id, label=key.label, plaintext=issued.plaintext, prefix=key.prefix, created_at=key.created_at
    )


def list_keys(services: Services, scope: ProjectScope, endpoint_id: str) -> list[EndpointKey]:
    """All keys of the endpoint, newest first, revoked ones included."""
    with services.db.read() as session:
        return [_key_to_wire(row) for row in endpoints.list_keys(session, scope.project.id, endpoint_id)]


def revoke_key(services: Services, scope: ProjectScope, endpoint_id: str, key_id: str) -> None:
    """Raises NotFoundError also for a key that is not of this endpoint."""
    with services.db.write() as session:
        row = endpoints.revoke_key(session, scope.project.id, endpoint_id, key_id)
    services.endpoints.invalidate(row.slug)


@dataclass(frozen=True)
class _Resolved:
    """A target that exists: what its endpoint stores, and what serving needs for it."""

    columns: dict[str, Any]
    base_model: str
    base_precision: str | None
    manifest: CheckpointManifest | None


def _resolve(
    session: Session, settings: Settings, project_id: str, target: ServedAdapter | ServedBaseModel
) -> _Resolved:
    if isinstance(target, ServedAdapter):
        adapter = target.adapter
        try:
            _, row = jobs.find_adapter(session, project_id, adapter)
        except (ConflictError, GoneError, NotFoundError) as error:
            raise type(error)(error.message, param="target.adapter") from error
        named = adapter.model_dump(by_alias=True, include={"kind", "job_id", "step"})
        columns: dict[str, Any] = {"target": {"kind": "adapter", "adapter": named}, "adapter_id": row.adapter_id}
        manifest = CheckpointManifest.model_validate(row.manifest)
        return _Resolved(columns, row.base_model, row.base_precision, manifest)
    try:
        base_model = settings.resolve_model(target.base_model)
    except ModelError as error:
        raise ModelError(error.message, param="target.baseModel") from error
    columns = {"target": {"kind": "base_model", "baseModel": target.base_model}, "adapter_id": None}
    return _Resolved(columns, base_model, None, None)


async def _prepare(services: Services, resolved: _Resolved) -> None:
    await services.inference.prepare(resolved.base_model, resolved.base_precision, resolved.manifest)


def _to_wire(settings: Settings, row: EndpointRow) -> Endpoint:
    return Endpoint(
        id=row.id,
        slug=row.slug,
        org_id=row.org_id,
        project_id=row.project_id,
        target=_TARGET.validate_python(row.target),
        auth_mode=row.auth_mode,
        url_format="openai_compat",
        enabled=row.enabled,
        custom_domain=None,
        run_retention_mode=row.run_retention_mode,
        run_retention_days=row.run_retention_days,
        created_at=row.created_at,
        updated_at=row.updated_at,
        url=settings.endpoint_url(row.slug),
    )


def _key_to_wire(row: EndpointKeyRow) -> EndpointKey:
    return EndpointKey(
        id=row.id,
        label=row.label,
        prefix=row.prefix,
        enabled=row.revoked_at is None,
        created_at=row.created_at,
        last_used_at=row.last_used_at,
    )
