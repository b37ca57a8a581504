"""Projects: one of a slug in an organisation, and a way out for clients with stale state."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from arkor_ray.db import identities, projects
from arkor_ray.db.session import Database
from arkor_ray.errors import ConflictError, NotFoundError


@pytest.fixture
def org_id(db: Database) -> str:
    with db.write() as session:
        return identities.create_anonymous(session, days=90).org.id


def test_slug_is_unique_within_an_org_only(db: Database, org_id: str) -> None:
    with db.write() as session:
        other = identities.create_anonymous(session, days=90).org.id
        projects.create(session, org_id, name="One", slug="one")
        projects.create(session, other, name="One", slug="one")
        with pytest.raises(ConflictError, match="'one'"):
            projects.create(session, org_id, name="Again", slug="one")
        assert [project.name for project in projects.list_projects(session, org_id)] == ["One"]


def test_list_is_complete_and_in_order(db: Database, org_id: str) -> None:
    with db.write() as session:
        for number in range(120):
            projects.create(session, org_id, name="x", slug=f"p{number}")
    with db.read() as session:
        assert [p.slug for p in projects.list_projects(session, org_id)] == [f"p{number}" for number in range(120)]


def test_unknown_project_says_how_to_recover(db: Database, org_id: str) -> None:
    with db.read() as session:
        for slug in ("gone", "\x00", "", "UPPER"):
            with pytest.raises(NotFoundError, match=r"delete \.arkor/state\.json"):
                projects.find(session, org_id, slug)


def test_of_many_creators_at_once_one_wins(db: Database, org_id: str) -> None:
    def create(_: int) -> bool:
        try:
            with db.write() as session:
                projects.create(session, org_id, name="x", slug="one")
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(8))) == 1
