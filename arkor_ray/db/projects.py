"""Projects: the second half of the scope that every job lives in."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from arkor_ray.db.tables import ProjectRow
from arkor_ray.errors import ConflictError, NotFoundError
from arkor_ray.schemas.project import SLUG


def create(session: Session, org_id: str, *, name: str, slug: str) -> ProjectRow:
    """Raises ConflictError if the organisation has a project of that slug."""
    project = ProjectRow(org_id=org_id, name=name, slug=slug)
    try:
        with session.begin_nested():
            session.add(project)
    except IntegrityError as error:
        raise ConflictError(f"A project with the slug {slug!r} exists already in this organisation") from error
    return project


def list_projects(session: Session, org_id: str) -> Sequence[ProjectRow]:
    """All of them, oldest first. Clients look for their slug here after a conflict, so there is no paging."""
    by_age = (ProjectRow.created_at, ProjectRow.id)
    return session.scalars(select(ProjectRow).where(ProjectRow.org_id == org_id).order_by(*by_age)).all()


def find(session: Session, org_id: str, slug: str) -> ProjectRow:
    """Raises NotFoundError, which tells a client with stale state what to do."""
    project = None
    if SLUG.fullmatch(slug):
        project = session.scalar(select(ProjectRow).where(ProjectRow.org_id == org_id, ProjectRow.slug == slug))
    if project is None:
        raise NotFoundError(
            f"No project {slug!r} in this organisation. If the server was set up anew since you last used it, "
            "delete .arkor/state.json and try again"
        )
    return project
