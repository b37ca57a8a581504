"""Endpoints and runs as rows, for tests that need no API."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from arkor_ray.db import endpoints, identities, projects
from arkor_ray.db.runs import NewRun
from arkor_ray.db.session import Database
from arkor_ray.db.tables import EndpointRow
from arkor_ray.schemas.base import utcnow

NOW = utcnow()


def publish(db: Database, slug: str, mode: str = "unlimited", days: int | None = None) -> EndpointRow:
    """An endpoint of a base model, in the one project that all of them are in."""
    with db.write() as session:
        org = identities.ensure_org(session, "org")
        projects_there = projects.list_projects(session, org.id)
        project = projects_there[0] if projects_there else projects.create(session, org.id, name="P", slug="p")
        target = {"kind": "base_model", "baseModel": "m"}
        return endpoints.create(
            session, org_id=org.id, project_id=project.id, slug=slug, target=target, adapter_id=None,
            auth_mode="none", retention=(mode, days),
        )  # fmt: skip


def run_of(endpoint: EndpointRow, at: datetime = NOW, **fields: Any) -> NewRun:
    given: dict[str, Any] = {
        "key_id": None, "model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": None,
        "answer": {"role": "assistant", "content": "yes"}, "finish_reason": "stop", "prompt_tokens": 9,
        "completion_tokens": 1, "latency_ms": 20, "first_token_ms": 10, "system_fingerprint": "fp", "created_at": at,
    }  # fmt: skip
    return NewRun(endpoint_id=endpoint.id, **{**given, **fields})
