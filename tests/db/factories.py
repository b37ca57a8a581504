"""Rows that many tests begin with."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from arkor_ray.db import jobs
from arkor_ray.db.session import Database
from arkor_ray.db.tables import OrgRow, ProjectRow


def create_job(db: Database, *, config: dict[str, Any] | None = None, dataset_token: str | None = "secret") -> str:
    """A queued job in the database's one project, which the first call makes; returns its id."""
    with db.write() as session:
        project = session.scalar(select(ProjectRow))
        if project is None:
            org = OrgRow(slug="org", name="Org")
            session.add(org)
            session.flush()
            project = ProjectRow(org_id=org.id, slug="project", name="Project")
            session.add(project)
            session.flush()
        return jobs.create(
            session,
            org_id=project.org_id,
            project_id=project.id,
            name="job",
            config=config or {},
            dataset_token=dataset_token,
        ).id
