"""What routes ask for in their signatures: the process's services, the caller, the scope of the request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request
from sqlalchemy.orm import Session

from arkor_ray.api.auth import bearer_token
from arkor_ray.api.endpoint_directory import EndpointDirectory
from arkor_ray.api.inference_gateway import DriverLogs, InferenceGateway
from arkor_ray.api.last_used import LastUsed
from arkor_ray.api.readiness import Readiness
from arkor_ray.api.run_store import RunStore
from arkor_ray.db import identities, projects
from arkor_ray.db.identities import Caller
from arkor_ray.db.session import Database
from arkor_ray.db.tables import OrgRow, ProjectRow
from arkor_ray.events.stream import EventTail
from arkor_ray.settings import Settings
from arkor_ray.storage import ObjectStore


@dataclass(frozen=True)
class Services:
    """One per process, made by `create_app`."""

    settings: Settings
    db: Database
    store: ObjectStore
    tail: EventTail
    inference: InferenceGateway
    logs: DriverLogs | None
    last_used: LastUsed
    endpoints: EndpointDirectory
    runs: RunStore
    readiness: Readiness


async def services(request: Request) -> Services:
    return request.app.state.services


def caller(services: ServicesDep, token: TokenDep) -> Caller:
    """Who calls. 401 for a token that is missing, unknown, expired or revoked."""
    with services.db.read() as session:
        return authenticate(session, services, token)


def org_scope(services: ServicesDep, token: TokenDep, org_slug: OrgSlug) -> OrgRow:
    """The organisation of the query. 403 if the caller is no member of it."""
    with services.db.read() as session:
        found = authenticate(session, services, token)
        return identities.member_org(session, found.identity_id, org_slug)


@dataclass(frozen=True)
class ProjectScope:
    org: OrgRow
    project: ProjectRow


def project_scope(services: ServicesDep, token: TokenDep, org_slug: OrgSlug, project_slug: ProjectSlug) -> ProjectScope:
    """Organisation and project of the query. 404 for an unknown project."""
    with services.db.read() as session:
        found = authenticate(session, services, token)
        org = identities.member_org(session, found.identity_id, org_slug)
        return ProjectScope(org, projects.find(session, org.id, project_slug))


def authenticate(session: Session, services: Services, token: str) -> Caller:
    found = identities.authenticate(session, token)
    services.last_used.note(found.token_id, found.token_last_used_at)
    return found


OrgSlug = Annotated[str, Query(alias="orgSlug")]
ProjectSlug = Annotated[str, Query(alias="projectSlug")]
TokenDep = Annotated[str, Depends(bearer_token)]
ServicesDep = Annotated[Services, Depends(services)]
CallerDep = Annotated[Caller, Depends(caller)]
OrgDep = Annotated[OrgRow, Depends(org_scope)]
ScopeDep = Annotated[ProjectScope, Depends(project_scope)]
