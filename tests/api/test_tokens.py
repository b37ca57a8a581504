"""Tokens for further users of an organisation: issued once, listed without their secret, revoked at once."""

from __future__ import annotations

from datetime import datetime

import httpx
import pytest

from arkor_ray.db import identities
from arkor_ray.db.session import Database
from tests.api.conftest import User

pytestmark = pytest.mark.anyio


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_issued_token_opens_the_org_as_another_user(user: User) -> None:
    answer = await user.post("/v1/tokens", {"label": "ci", "email": "ci@example.com"})
    assert answer.status_code == 201
    issued = answer.json()
    assert issued["label"] == "ci" and issued["org"]["slug"] == user.org_slug
    me = (await user.http.get("/v1/me", headers=bearer(issued["token"]))).json()
    assert me["user"] == {"id": issued["user"]["id"], "email": "ci@example.com", "kind": "operator"}
    assert me["user"]["id"] != user.identity_id
    jobs = await user.http.get("/v1/jobs", headers=bearer(issued["token"]), params=user.scope)
    assert jobs.status_code == 200


async def test_secret_is_in_the_first_answer_only(user: User) -> None:
    issued = (await user.post("/v1/tokens", {"label": "ci"})).json()
    listed = await user.get("/v1/tokens")
    assert issued["token"] not in listed.text and user.token not in listed.text
    newest, own = listed.json()["tokens"]
    assert newest["id"] == issued["id"] and issued["token"].startswith(newest["prefix"])
    assert set(own) == {"id", "label", "prefix", "createdAt", "expiresAt", "lastUsedAt", "revokedAt"}


async def test_revoked_token_stops_at_once_and_stays_listed(user: User) -> None:
    issued = (await user.post("/v1/tokens", {"label": "ci"})).json()
    answer = await user.delete(f"/v1/tokens/{issued['id']}")
    assert answer.status_code == 204 and answer.content == b""
    assert (await user.http.get("/v1/me", headers=bearer(issued["token"]))).status_code == 401
    listed = {token["id"]: token for token in (await user.get("/v1/tokens")).json()["tokens"]}
    assert listed[issued["id"]]["revokedAt"] is not None
    assert (await user.get("/v1/me")).status_code == 200


async def test_unknown_token_cannot_be_revoked(user: User) -> None:
    assert (await user.delete("/v1/tokens/none")).status_code == 404


async def test_issued_token_never_outlives_the_one_that_issued_it(user: User) -> None:
    [own] = (await user.get("/v1/tokens")).json()["tokens"]
    for body in ({"label": "x"}, {"label": "x", "expiresInDays": 10_000}):
        assert (await user.post("/v1/tokens", body)).json()["expiresAt"] == own["expiresAt"]
    sooner = (await user.post("/v1/tokens", {"label": "x", "expiresInDays": 1})).json()["expiresAt"]
    assert datetime.fromisoformat(sooner) < datetime.fromisoformat(own["expiresAt"])


async def test_token_of_the_operator_may_issue_endless_ones(http: httpx.AsyncClient, db: Database) -> None:
    with db.write() as session:
        root = identities.issue_token(session, identities.ensure_org(session, "research"), label="root")
    answer = await http.post(
        "/v1/tokens", json={"label": "x"}, params={"orgSlug": "research"}, headers=bearer(root.plaintext)
    )
    assert answer.json()["expiresAt"] is None


@pytest.mark.parametrize(
    "body", [{}, {"label": ""}, {"label": "x" * 201}, {"label": "x", "expiresInDays": 0}, {"label": "x", "email": 5}]
)
async def test_unfit_token_request_is_400(user: User, body: dict[str, object]) -> None:
    assert (await user.post("/v1/tokens", body)).status_code == 400
