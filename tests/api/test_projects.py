"""Projects: made once per slug, listed whole."""

from __future__ import annotations

import pytest

from tests.api.conftest import User

pytestmark = pytest.mark.anyio


async def test_created_project_has_every_field_the_client_requires(user: User) -> None:
    answer = await user.post("/v1/projects", {"name": "My App", "slug": "my-app", "future": 1})
    assert answer.status_code == 201
    project = answer.json()["project"]
    assert set(project) == {"id", "slug", "name", "orgId", "createdAt", "updatedAt"}
    assert all(isinstance(value, str) for value in project.values())
    assert (project["slug"], project["name"]) == ("my-app", "My App") and project["createdAt"].endswith("Z")


async def test_list_has_the_org_and_every_project(user: User) -> None:
    for number in range(30):
        await user.post("/v1/projects", {"name": "x", "slug": f"p-{number}"})
    body = (await user.get("/v1/projects")).json()
    assert body["org"]["slug"] == user.org_slug
    assert {p["slug"] for p in body["projects"]} == {user.project_slug, *(f"p-{number}" for number in range(30))}


async def test_taken_slug_is_409_and_the_list_finds_it(user: User) -> None:
    answer = await user.post("/v1/projects", {"name": "again", "slug": user.project_slug})
    assert answer.status_code == 409 and answer.json()["code"] == "conflict"
    assert [p["slug"] for p in (await user.get("/v1/projects")).json()["projects"]] == [user.project_slug]


@pytest.mark.parametrize("slug", ["a", "0", "a-", "a" * 40, "project"])
async def test_slugs_that_the_client_makes_are_accepted(user: User, slug: str) -> None:
    assert (await user.post("/v1/projects", {"name": "x", "slug": slug})).status_code == 201


@pytest.mark.parametrize("slug", ["", "-a", "A", "a_b", "a" * 41, "ä", "a\n", None, 5])
async def test_other_slugs_are_400(user: User, slug: object) -> None:
    answer = await user.post("/v1/projects", {"name": "x", "slug": slug})
    assert answer.status_code == 400 and answer.json()["param"] == "slug"
