"""Projects of an organisation."""

from __future__ import annotations

from fastapi import APIRouter

from arkor_ray.api.bodies import ProjectAnswer, ProjectList
from arkor_ray.api.deps import OrgDep, ServicesDep
from arkor_ray.api.request_body import StrictJsonRoute
from arkor_ray.db import projects
from arkor_ray.db.tables import ProjectRow
from arkor_ray.schemas.identity import Org
from arkor_ray.schemas.project import Project, ProjectCreate

router = APIRouter(prefix="/v1/projects", tags=["projects"], route_class=StrictJsonRoute)


@router.get("", summary="List all projects of an organisation")
def list_projects(services: ServicesDep, org: OrgDep) -> ProjectList:
    with services.db.read() as session:
        rows = projects.list_projects(session, org.id)
    return ProjectList(org=Org(slug=org.slug, id=org.id, name=org.name), projects=[_to_wire(row) for row in rows])


@router.post("", status_code=201, summary="Make a project; 409 if its slug is taken")
def create_project(services: ServicesDep, org: OrgDep, body: ProjectCreate) -> ProjectAnswer:
    with services.db.write() as session:
        row = projects.create(session, org.id, name=body.name, slug=body.slug)
    return ProjectAnswer(project=_to_wire(row))


def _to_wire(row: ProjectRow) -> Project:
    return Project(
        id=row.id,
        slug=row.slug,
        name=row.name,
        org_id=row.org_id,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
