"""Getting in: anonymous tokens, the CLI's login configuration, who one is."""

from __future__ import annotations

import httpx
import pytest

from arkor_ray.api.app import create_app
from arkor_ray.db import identities
from arkor_ray.db.session import Database
from arkor_ray.settings import Settings
from tests.api.conftest import FakeGateway, User

pytestmark = pytest.mark.anyio


async def test_anonymous_identity_has_every_field_the_client_requires(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/auth/anonymous", json={"kind": "cli"})
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"token", "anonymousId", "kind", "personalOrg"} and body["kind"] == "cli"
    assert set(body["personalOrg"]) == {"id", "slug", "name"} and body["personalOrg"]["name"] == "Anonymous"


async def test_each_anonymous_call_makes_a_new_identity_and_org(http: httpx.AsyncClient) -> None:
    first, second = [(await http.post("/v1/auth/anonymous", json={"kind": "web"})).json() for _ in range(2)]
    assert first["kind"] == "web"
    assert first["token"] != second["token"] and first["personalOrg"]["id"] != second["personalOrg"]["id"]


async def test_anonymous_call_needs_no_body_but_refuses_an_unknown_kind(http: httpx.AsyncClient) -> None:
    assert (await http.post("/v1/auth/anonymous")).json()["kind"] == "cli"
    refused = await http.post("/v1/auth/anonymous", json={"kind": "robot"})
    assert refused.status_code == 400 and "kind" in refused.json()["error"]


async def test_operator_can_switch_anonymous_tokens_off(settings: Settings, db: Database, gateway: FakeGateway) -> None:
    app = create_app(settings.model_copy(update={"anonymous": False}), db, gateway)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://arkor.localhost") as http:
        answer = await http.post("/v1/auth/anonymous", json={"kind": "cli"})
        assert answer.status_code == 403 and "operator" in answer.json()["error"]
        with db.write() as session:
            issued = identities.issue_token(session, identities.ensure_org(session, "research"), label="ci")
        me = await http.get("/v1/me", headers={"Authorization": f"Bearer {issued.plaintext}"})
        assert [org["slug"] for org in me.json()["orgs"]] == ["research"]


async def test_cli_config_says_there_is_no_oauth(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/auth/cli/config")
    assert answer.json() == {"auth0Domain": None, "clientId": None, "audience": None, "callbackPorts": []}


async def test_me_names_the_user_and_its_orgs(user: User) -> None:
    body = (await user.get("/v1/me")).json()
    assert body["user"] == {"id": user.identity_id, "email": None, "kind": "anonymous"}
    [org] = body["orgs"]
    assert org["slug"] == user.org_slug and set(org) == {"id", "slug", "name"}


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer arkt_wrong", "Bearer \x7f"])
async def test_request_without_a_valid_token_is_401(http: httpx.AsyncClient, header: str | None) -> None:
    answer = await http.get("/v1/me", headers={} if header is None else {"Authorization": header})
    assert answer.status_code == 401
    assert answer.json()["code"] == "unauthorized" and answer.json()["error"].startswith("unauthorized: ")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_scheme_of_the_token_is_case_insensitive(user: User) -> None:
    answer = await user.http.get("/v1/me", headers={"Authorization": f"bearer {user.token}"})
    assert answer.status_code == 200


@pytest.mark.parametrize("client", [None, "arkor/0.0.3-alpha.1", "arkor/0.0.0-dev", "nonsense"])
async def test_no_client_version_is_turned_away(user: User, client: str | None) -> None:
    answer = await user.get("/v1/me", headers={} if client is None else {"X-Arkor-Client": client})
    assert answer.status_code == 200
    assert not {"deprecation", "warning", "sunset"} & set(answer.headers)


async def test_use_of_a_token_is_noted_once_in_a_while(user: User) -> None:
    await user.get("/v1/me")
    user.app.state.services.last_used.close()  # writes what it holds
    [token] = (await user.get("/v1/tokens")).json()["tokens"]
    assert token["lastUsedAt"] is not None
