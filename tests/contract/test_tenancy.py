"""Tenants: what another identity reaches of one's things on a running service, which must be nothing at all.

Each route of the service's own OpenAPI document is in one of the tables below, or the first test fails.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.contract.conftest import ANSWER, QUESTION, STEPS, Recorded
from tests.contract.wire import UNKNOWN_ID, Caller, text_of
from tests.servers.arkor import RunningService, wait_for

pytestmark = pytest.mark.integration

PUBLIC = {
    ("POST", "/v1/auth/anonymous"),
    ("GET", "/v1/auth/cli/config"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    # Opened by the endpoint's own keys, see test_endpoints.py.
    ("POST", "/e/{slug}/v1/chat/completions"),
    ("GET", "/e/{slug}/v1/models"),
}
# What these answer depends on the caller alone: nobody can name another's things to them.
PERSONAL = {
    ("GET", "/v1/me"),
    ("GET", "/v1/models"),
    ("GET", "/v1/projects"),
    ("POST", "/v1/projects"),
    ("GET", "/v1/tokens"),
    ("POST", "/v1/tokens"),
    ("GET", "/v1/jobs"),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/endpoints"),
}
FINAL = {"kind": "final", "jobId": "{job_id}"}
CHECKPOINT = {"kind": "checkpoint", "jobId": "{job_id}", "step": STEPS}
MESSAGES = [{"role": "user", "content": QUESTION}]
CHAT = {"messages": MESSAGES, "maxTokens": 2}


def served(adapter: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "adapter", "adapter": adapter}


# Method, route and body of what names another's job, endpoint, key or token, in the path or in the body.
NAMING: list[tuple[str, str, Any]] = [
    ("GET", "/v1/jobs/{job_id}", None),
    ("POST", "/v1/jobs/{job_id}/cancel", None),
    ("GET", "/v1/jobs/{job_id}/logs", None),
    ("GET", "/v1/jobs/{job_id}/events/stream", None),
    ("GET", "/v1/jobs/{job_id}/checkpoints", None),
    ("GET", "/v1/jobs/{job_id}/checkpoints/{ref}", None),
    ("GET", "/v1/jobs/{job_id}/checkpoints/{ref}/files/{path}", None),
    ("POST", "/v1/inference/chat", {**CHAT, "adapter": FINAL, "stream": False}),
    ("POST", "/v1/inference/chat", {**CHAT, "adapter": CHECKPOINT, "stream": True}),
    ("POST", "/v1/chat/completions", {"model": "{job_id}", "messages": MESSAGES, "max_tokens": 2}),
    ("POST", "/v1/chat/completions", {"model": "{job_id}:20", "messages": MESSAGES, "max_tokens": 2, "stream": True}),
    ("GET", "/v1/models/{model}", None),
    ("POST", "/v1/endpoints", {"slug": "{new_slug}", "authMode": "none", "target": served(FINAL)}),
    ("POST", "/v1/endpoints", {"slug": "{new_slug}", "authMode": "none", "target": served(CHECKPOINT)}),
    ("PATCH", "/v1/endpoints/{own_endpoint_id}", {"target": served(FINAL)}),
    ("GET", "/v1/endpoints/{endpoint_id}", None),
    ("PATCH", "/v1/endpoints/{endpoint_id}", {"enabled": False}),
    ("PATCH", "/v1/endpoints/{endpoint_id}", {"target": {"kind": "base_model", "baseModel": "tiny"}}),
    ("DELETE", "/v1/endpoints/{endpoint_id}", None),
    ("GET", "/v1/endpoints/{endpoint_id}/keys", None),
    ("POST", "/v1/endpoints/{endpoint_id}/keys", {"label": "x"}),
    ("DELETE", "/v1/endpoints/{endpoint_id}/keys/{key_id}", None),
    ("DELETE", "/v1/endpoints/{own_endpoint_id}/keys/{key_id}", None),
    ("GET", "/v1/endpoints/{endpoint_id}/runs", None),
    ("GET", "/v1/endpoints/{endpoint_id}/runs/export", None),
    ("DELETE", "/v1/tokens/{token_id}", None),
]


@dataclass
class Owned:
    """One tenant's things, by the names that paths and bodies have for them."""

    names: dict[str, str]
    slug: str
    key: str


@pytest.fixture(scope="module")
def owned(caller: Caller, finished: Recorded, service: RunningService) -> Owned:
    """A finished job, an endpoint with a key and a run, and a further token."""
    endpoint = caller.create_endpoint(served(finished.final), authMode="fixed_api_key")
    key = caller.post(f"/v1/endpoints/{endpoint['id']}/keys", {"label": "mine"}).json()["key"]
    chat = {"messages": MESSAGES, "temperature": 0, "max_tokens": 32, "stream": True}
    opened = {"Authorization": f"Bearer {key['plaintext']}"}
    url = f"{service.url}/e/{endpoint['slug']}/v1/chat/completions"
    assert text_of(httpx.post(url, json=chat, headers=opened, timeout=60).content) == ANSWER
    token = caller.post("/v1/tokens", {"label": "mine"}).json()
    names = {
        "job_id": finished.id,
        "model": finished.id,
        "ref": "final",
        "path": "adapter_model.safetensors",
        "endpoint_id": endpoint["id"],
        "key_id": key["id"],
        "token_id": token["id"],
    }
    return Owned(names, endpoint["slug"], key["plaintext"])


@pytest.fixture(scope="module")
def own_endpoint_id(stranger: Caller) -> str:
    return stranger.create_endpoint({"kind": "base_model", "baseModel": "tiny"})["id"]


def ask(who: Caller, method: str, route: str, body: Any, names: dict[str, str], **params: str) -> httpx.Response:
    """The answer to a call of the table with these names."""
    names = {**names, "new_slug": f"t-{uuid.uuid4().hex[:12]}"}
    content = None if body is None else json.dumps(body)
    for name, value in names.items():
        route = route.replace(f"{{{name}}}", value)
        content = content.replace(f"{{{name}}}", value) if content else content
    headers = {"Content-Type": "application/json"} if content else {}
    return who.call(method, route, content=content, headers=headers, params=params)


def test_every_route_of_the_service_is_in_a_table(service: RunningService) -> None:
    paths = httpx.get(f"{service.url}/openapi.json", timeout=60).json()["paths"]
    routes = {(method.upper(), path) for path, item in paths.items() for method in item}
    naming = {(method, route.replace("{own_endpoint_id}", "{endpoint_id}")) for method, route, _ in NAMING}
    assert routes == PUBLIC | PERSONAL | naming


@pytest.mark.parametrize(("method", "route", "body"), [each for each in NAMING if each[0] == "GET"])
def test_owner_may_what_the_stranger_may_not(caller: Caller, owned: Owned, method: str, route: str, body: Any) -> None:
    """Else a name that means nothing would pass all the tests below."""
    assert ask(caller, method, route, body, owned.names).status_code == 200


@pytest.mark.parametrize(("method", "route", "body"), NAMING)
def test_foreign_thing_answers_like_one_that_never_was(
    stranger: Caller, owned: Owned, own_endpoint_id: str, method: str, route: str, body: Any
) -> None:
    own = {"own_endpoint_id": own_endpoint_id}
    missing = {
        name: UNKNOWN_ID if name.endswith("_id") or name == "model" else value for name, value in owned.names.items()
    }
    foreign = ask(stranger, method, route, body, {**owned.names, **own})
    unknown = ask(stranger, method, route, body, {**missing, **own})
    assert foreign.status_code == unknown.status_code == 404, foreign.text
    text = foreign.text
    for name in ("job_id", "endpoint_id", "key_id", "token_id"):
        text = text.replace(owned.names[name], UNKNOWN_ID)
    assert text == unknown.text
    volatile = {"date", "x-request-id", "content-length"}
    assert {k: v for k, v in foreign.headers.items() if k not in volatile} == {
        k: v for k, v in unknown.headers.items() if k not in volatile
    }


@pytest.mark.parametrize(("method", "route", "body"), NAMING)
def test_scope_of_another_org_is_forbidden(
    caller: Caller, stranger: Caller, owned: Owned, own_endpoint_id: str, method: str, route: str, body: Any
) -> None:
    scope = {"orgSlug": caller.org_slug, "projectSlug": caller.project_slug}
    answer = ask(stranger, method, route, body, {**owned.names, "own_endpoint_id": own_endpoint_id}, **scope)
    # OpenAI's routes know no scope: the token alone says whose adapters are meant.
    assert answer.status_code == (404 if route.startswith(("/v1/chat", "/v1/models")) else 403)


@pytest.mark.parametrize(("method", "route"), sorted(PERSONAL | {(method, route) for method, route, _ in NAMING}))
def test_nothing_but_what_is_public_opens_without_a_token(
    service: RunningService, caller: Caller, owned: Owned, method: str, route: str
) -> None:
    for name, value in {**owned.names, "own_endpoint_id": owned.names["endpoint_id"]}.items():
        route = route.replace(f"{{{name}}}", value)
    for authorization in ({}, {"Authorization": "Bearer arkt_none"}, {"Authorization": f"Bearer {owned.key}"}):
        answer = httpx.request(method, service.url + route, params=caller.scope, headers=authorization, timeout=60)
        assert answer.status_code == 401, answer.text


@pytest.mark.parametrize("route", ["/v1/jobs", "/v1/endpoints", "/v1/models", "/v1/projects", "/v1/tokens", "/v1/me"])
def test_lists_have_nothing_of_others(stranger: Caller, caller: Caller, owned: Owned, route: str) -> None:
    listed = stranger.get(route)
    assert listed.status_code == 200
    hidden = [*(owned.names[name] for name in ("job_id", "endpoint_id", "key_id", "token_id")), owned.slug]
    for name in (*hidden, caller.org_slug, caller.org_id, caller.project_id):
        assert name not in listed.text


def test_strangers_left_everything_as_it_was(caller: Caller, owned: Owned, service: RunningService) -> None:
    """Runs after all of the above: what was refused was not done all the same."""
    endpoint = caller.get(f"/v1/endpoints/{owned.names['endpoint_id']}").json()["deployment"]
    assert endpoint["enabled"] is True and endpoint["target"]["kind"] == "adapter"
    [key] = caller.get(f"/v1/endpoints/{endpoint['id']}/keys").json()["keys"]
    assert (key["id"], key["enabled"]) == (owned.names["key_id"], True)
    assert caller.get(f"/v1/jobs/{owned.names['job_id']}").json()["job"]["status"] == "completed"
    [token] = [t for t in caller.get("/v1/tokens").json()["tokens"] if t["id"] == owned.names["token_id"]]
    assert token["revokedAt"] is None
    headers = {"x-api-key": owned.key}
    assert httpx.get(f"{service.url}/e/{owned.slug}/v1/models", headers=headers).status_code == 200
    path = f"/v1/endpoints/{endpoint['id']}/runs/export"
    wait_for(lambda: bool(caller.get(path).content), 30, "the run was not kept")
    exported = [json.loads(line) for line in caller.get(path).text.splitlines()]
    assert [row["messages"][-1]["content"] for row in exported] == [ANSWER]
