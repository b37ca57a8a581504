"""A page in somebody's browser reaches a server on that machine; it must not be let in for that alone."""

from __future__ import annotations

import socket

import httpx
import pytest

from arkor_ray.api.app import create_app
from arkor_ray.db.session import Database
from arkor_ray.settings import Settings
from tests.api.conftest import FakeGateway

pytestmark = pytest.mark.anyio

SHARED = {"host": "0.0.0.0", "anonymous": True}


async def mint(
    settings: Settings, db: Database, values: dict[str, object], headers: dict[str, str], method: str = "POST"
) -> httpx.Response:
    """What a request for a token is answered, by a server with these settings and to these headers."""
    app = create_app(Settings(**{**settings.model_dump(), "anonymous": None, **values}), db, FakeGateway())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as http:
        return await http.request(method, "/v1/auth/anonymous", headers=headers)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "localhost.:8000", "[::1]:8000", "127.8.8.8", "192.168.1.7:8000"],
)
async def test_addresses_and_this_machines_names_are_known(settings: Settings, db: Database, host: str) -> None:
    assert (await mint(settings, db, {}, {"Host": host})).status_code == 200


async def test_names_that_the_operator_lists_are_known(settings: Settings, db: Database) -> None:
    listed = {**SHARED, "host_names": "arkor-api, arkor-api.team.svc"}
    for host in ("arkor-api", "arkor-api:80", "ARKOR-API.team.svc:80"):
        assert (await mint(settings, db, listed, {"Host": host})).status_code == 200
    for host in ("arkor-api.team", "team.svc", "x.arkor-api"):
        assert (await mint(settings, db, listed, {"Host": host})).status_code == 403


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "127.0.0.1:8000@evil.example",
        "evil.example#127.0.0.1",
        "[evil",
    ],
)
@pytest.mark.parametrize("values", [{}, SHARED])
async def test_a_name_that_was_made_to_lead_here_is_refused(
    settings: Settings, db: Database, values: dict[str, object], host: str
) -> None:
    answer = await mint(settings, db, values, {"Host": host})
    assert answer.status_code == 403
    assert answer.json()["code"] == "forbidden" and "ARKOR_RAY_PUBLIC_URL" in answer.json()["error"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "file://", "http://127.0.0.1.evil.example", "http://[x"]
)
async def test_pages_of_other_origins_are_refused(settings: Settings, db: Database, origin: str) -> None:
    answer = await mint(settings, db, {}, {"Origin": origin})
    assert answer.status_code == 403 and "Pages of" in answer.json()["error"]


async def test_page_without_a_name_is_not_the_servers_own_where_the_host_has_none_either(
    settings: Settings, db: Database
) -> None:
    answer = await mint(settings, db, {}, {"Host": "", "Origin": "null"})
    assert answer.status_code == 403


@pytest.mark.parametrize(
    ("values", "headers"),
    [
        ({}, {"Origin": "http://localhost:3000"}),
        ({"public_url": "https://arkor.example"}, {"Host": "arkor.example", "Origin": "https://arkor.example"}),
        ({"endpoints_domain": "models.example"}, {"Host": "models.example"}),
        ({**SHARED, "host": "gpu-box"}, {"Host": "gpu-box:8000"}),
        (SHARED, {"Host": f"{socket.gethostname()}:8000"}),
        (SHARED, {"Host": "192.168.1.7:8000", "Origin": "http://192.168.1.7:8000"}),
    ],
)
async def test_the_servers_own_names_and_pages_are_known(
    settings: Settings, db: Database, values: dict[str, object], headers: dict[str, str]
) -> None:
    assert (await mint(settings, db, values, headers)).status_code == 200


async def test_where_only_tokens_let_in_any_name_may_lead_here(settings: Settings, db: Database) -> None:
    answer = await mint(settings, db, {"host": "0.0.0.0", "anonymous": False}, {"Host": "arkor.svc.cluster.local"})
    assert answer.status_code == 403 and "gives out no anonymous tokens" in answer.json()["error"]


async def test_no_answer_lets_a_page_of_elsewhere_read_it(settings: Settings, db: Database) -> None:
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for method in ("POST", "GET", "OPTIONS"):
        for origin in ("https://evil.example", "http://localhost:3000"):
            answer = await mint(settings, db, {}, {"Origin": origin, **asking}, method)
            assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_header_injection_by_the_host_is_not_answered_with_a_header(settings: Settings, db: Database) -> None:
    answer = await mint(settings, db, {}, {"Host": "evil.example%0d%0aSet-Cookie:x"})
    assert answer.status_code == 403 and "set-cookie" not in answer.headers
