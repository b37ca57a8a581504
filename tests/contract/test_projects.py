"""Projects on the wire."""

from __future__ import annotations

import pytest

from tests.contract.wire import ISO, UUID, Caller, assert_error
from tests.servers.arkor import RunningService

pytestmark = pytest.mark.integration


def test_created_project_has_every_field_that_the_client_requires(caller: Caller) -> None:
    answer = caller.post("/v1/projects", {"name": "My Project", "slug": "my-project"})
    assert answer.status_code == 201
    project = answer.json()["project"]
    assert UUID.fullmatch(project["id"]) and project["orgId"] == caller.org_id
    assert (project["slug"], project["name"]) == ("my-project", "My Project")
    assert ISO.fullmatch(project["createdAt"]) and ISO.fullmatch(project["updatedAt"])


def test_taken_slug_is_409_and_the_list_has_the_project(caller: Caller) -> None:
    """What the client does on 409: list, and take the one with the same slug."""
    assert caller.post("/v1/projects", {"name": "a", "slug": "taken"}).status_code == 201
    assert_error(caller.post("/v1/projects", {"name": "b", "slug": "taken"}), 409, "conflict")
    listed = caller.get("/v1/projects").json()
    assert listed["org"]["slug"] == caller.org_slug and listed["org"]["id"] == caller.org_id
    [found] = [project for project in listed["projects"] if project["slug"] == "taken"]
    assert found["name"] == "a"


def test_slug_of_another_org_is_free(stranger: Caller) -> None:
    assert stranger.post("/v1/projects", {"name": "a", "slug": "taken"}).status_code == 201


def test_list_is_complete(service: RunningService) -> None:
    own = Caller.login(service.url)
    wanted = {f"p-{n}" for n in range(60)}
    for slug in wanted:
        assert own.post("/v1/projects", {"name": slug, "slug": slug}).status_code == 201
    assert {project["slug"] for project in own.get("/v1/projects").json()["projects"]} == wanted | {own.project_slug}


@pytest.mark.parametrize("slug", ["a", "0", "project", "ends-in-", "a--b", "x" * 40])
def test_slug_that_the_client_derives_is_accepted(caller: Caller, slug: str) -> None:
    assert caller.post("/v1/projects", {"name": "dir", "slug": slug}).status_code == 201


@pytest.mark.parametrize("slug", ["", "-a", "A", "a_b", "a b", "ä", "x" * 41, "a/b", "a\n"])
def test_other_slugs_are_400(caller: Caller, slug: str) -> None:
    assert assert_error(caller.post("/v1/projects", {"name": "dir", "slug": slug}), 400)["param"] == "slug"
