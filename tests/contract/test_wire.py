"""The rules of the wire that every route keeps: transport, headers, errors, scope. As bytes on a socket where they matter."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.contract.wire import UNKNOWN_ID, Caller, assert_error, exchange, request_bytes
from tests.servers.arkor import RunningService

pytestmark = pytest.mark.integration

CHAT = {"messages": [{"role": "user", "content": "hi"}], "baseModel": "tiny", "stream": False}
JOB = f"/v1/jobs/{UNKNOWN_ID}"
ENDPOINT = f"/v1/endpoints/{UNKNOWN_ID}"
SCOPED = [
    ("GET", "/v1/jobs"),
    ("POST", "/v1/jobs"),
    ("GET", JOB),
    ("POST", f"{JOB}/cancel"),
    ("GET", f"{JOB}/events/stream"),
    ("POST", "/v1/inference/chat"),
    ("GET", "/v1/endpoints"),
    ("POST", "/v1/endpoints"),
    ("GET", ENDPOINT),
    ("PATCH", ENDPOINT),
    ("DELETE", ENDPOINT),
    ("GET", f"{ENDPOINT}/keys"),
    ("POST", f"{ENDPOINT}/keys"),
    ("DELETE", f"{ENDPOINT}/keys/{UNKNOWN_ID}"),
]
PROJECTS = [("GET", "/v1/projects"), ("POST", "/v1/projects")]
BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/v1/jobs"): {"name": "x", "config": {"model": "tiny"}},
    ("POST", "/v1/inference/chat"): CHAT,
    ("POST", "/v1/endpoints"): {
        "slug": "not-made",
        "target": {"kind": "base_model", "baseModel": "tiny"},
        "authMode": "none",
    },
    ("PATCH", ENDPOINT): {"enabled": False},
    ("POST", f"{ENDPOINT}/keys"): {"label": "x"},
    ("POST", "/v1/projects"): {"name": "x", "slug": "x"},
}
BROKEN = [
    ("GET", "/v1/nothing", None, 404, "not_found"),
    ("GET", "/", None, 404, "not_found"),
    ("PUT", "/v1/jobs", None, 405, "method_not_allowed"),
    ("DELETE", "/v1/projects", None, 405, "method_not_allowed"),
    ("POST", "/v1/jobs", b"{", 400, "invalid_request"),
    ("POST", "/v1/jobs", b"", 400, "invalid_request"),
    ("POST", "/v1/jobs", b"[]", 400, "invalid_request"),
    ("POST", "/v1/jobs", b'{"name": "x", "config": {"learningRate": NaN}}', 400, "invalid_request"),
    ("POST", "/v1/jobs", b'{"name": "\xff", "config": {}}', 400, "invalid_request"),
    ("POST", "/v1/jobs", b"[" * 100_000, 400, "invalid_request"),
    ("POST", "/v1/jobs", b'{"config": {}}', 400, "invalid_request"),
    ("POST", "/v1/projects", b'{"slug": "x"}', 400, "invalid_request"),
    ("POST", "/v1/inference/chat", b'{"messages": []}', 400, "invalid_request"),
    ("POST", "/v1/jobs", b" " * (9 * 2**20), 413, "payload_too_large"),
    ("GET", JOB, None, 404, "not_found"),
    ("POST", f"{JOB}/cancel", None, 404, "not_found"),
    ("GET", f"{JOB}/events/stream", None, 404, "not_found"),
    ("GET", "/v1/jobs/..%2f..%2fetc", None, 404, "not_found"),
    ("GET", f"/v1/jobs/{'x' * 2000}", None, 404, "not_found"),
    ("GET", ENDPOINT, None, 404, "not_found"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "code"), BROKEN)
def test_error_is_the_contracts_envelope(
    caller: Caller, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    headers = {"Content-Type": "application/json"} if body is not None else {}
    answer = caller.call(method, path, content=body, headers=headers)
    assert_error(answer, status, code)
    assert caller.token not in answer.text, "a token is never echoed"


@pytest.mark.parametrize(
    "target", ["/v1/jobs/", "/v1/projects/", "/v1/me/", "/v1/endpoints/", f"{JOB}/", "/v1/auth/anonymous/", "//v1/me"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_path_is_ever_redirected(caller: Caller, service: RunningService, method: str, target: str) -> None:
    [answer] = exchange(
        service.url, request_bytes(method, target, f"Authorization: Bearer {caller.token}", "Content-Length: 0")
    )
    assert answer.status in (404, 405) and "location" not in answer.headers
    assert json.loads(answer.body)["error"]


@pytest.mark.parametrize("agent", [None, "arkor/0.0.3-alpha.1", "arkor/0.0.0-dev", "arkor/99.0.0", "curl", ""])
def test_every_client_version_is_served(service: RunningService, agent: str | None) -> None:
    """426 is never sent, whatever X-Arkor-Client says."""
    headers = [f"X-Arkor-Client: {agent}"] if agent is not None else []
    [answer] = exchange(service.url, request_bytes("GET", "/v1/auth/cli/config", *headers))
    assert answer.status_line == "HTTP/1.1 200 OK"


@pytest.mark.parametrize("path", ["/v1/me", "/v1/projects", "/v1/jobs", "/v1/nothing", JOB])
def test_advisory_headers_are_not_sent(caller: Caller, path: str) -> None:
    assert not {"deprecation", "warning", "sunset"} & set(caller.get(path).headers)


def test_success_is_http_1_1_with_json_in_utf_8(caller: Caller, service: RunningService) -> None:
    name = "Zürich — 東京 🎈"
    body = json.dumps({"name": name, "slug": "utf-8"}, ensure_ascii=False).encode()
    made, listed = exchange(
        service.url,
        request_bytes(
            "POST", f"/v1/projects?orgSlug={caller.org_slug}", f"Authorization: Bearer {caller.token}",
            "Content-Type: application/json", f"Content-Length: {len(body)}", body=body,
        ),
        request_bytes("GET", f"/v1/projects?orgSlug={caller.org_slug}", f"Authorization: Bearer {caller.token}"),
    )  # fmt: skip
    assert made.status_line == "HTTP/1.1 201 Created" and listed.status_line == "HTTP/1.1 200 OK"
    assert made.headers["content-type"] == listed.headers["content-type"] == "application/json"
    assert json.loads(made.body.decode("utf-8"))["project"]["name"] == name
    assert name in {project["name"] for project in json.loads(listed.body.decode("utf-8"))["projects"]}


def test_cancel_and_delete_need_neither_body_nor_content_type(caller: Caller, service: RunningService) -> None:
    scope = f"orgSlug={caller.org_slug}&projectSlug={caller.project_slug}"
    for method, path in (("POST", f"{JOB}/cancel"), ("DELETE", ENDPOINT)):
        [answer] = exchange(
            service.url, request_bytes(method, f"{path}?{scope}", f"Authorization: Bearer {caller.token}")
        )
        assert answer.status == 404 and json.loads(answer.body)["code"] == "not_found"


def test_connection_lives_on_after_errors(caller: Caller, service: RunningService) -> None:
    """Node's fetch keeps connections; a refusal must leave the next request on it intact."""
    token = f"Authorization: Bearer {caller.token}"
    bad = b'{"messages": "no"}'
    scope = f"orgSlug={caller.org_slug}&projectSlug={caller.project_slug}"
    answers = exchange(
        service.url,
        request_bytes("GET", "/v1/me"),
        request_bytes("POST", f"/v1/inference/chat?{scope}", token, "Content-Type: application/json",
                      f"Content-Length: {len(bad)}", body=bad),
        request_bytes("GET", "/v1/nothing", token),
        request_bytes("GET", "/v1/me", token),
    )  # fmt: skip
    assert [answer.status for answer in answers] == [401, 400, 404, 200]


# Tokens and scope


@pytest.mark.parametrize(("method", "path"), [*SCOPED, *PROJECTS, ("GET", "/v1/me"), ("GET", "/v1/tokens")])
@pytest.mark.parametrize(
    "authorization", [None, "Bearer arkt_wrong", "Bearer", "Basic dTpw", "Bearer ark_live_00000000"]
)
def test_call_without_a_valid_token_is_401(caller: Caller, method: str, path: str, authorization: str | None) -> None:
    headers = {"Authorization": authorization} if authorization is not None else {}
    answer = caller.http.request(method, path, params=caller.scope, json=BODIES.get((method, path)), headers=headers)
    assert_error(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "arkt_wrong" not in answer.text and "ark_live_00000000" not in answer.text


@pytest.mark.parametrize(("method", "path"), [*SCOPED, *PROJECTS])
@pytest.mark.parametrize("org", ["foreign", "unknown"])
def test_org_that_is_not_the_callers_is_403(caller: Caller, stranger: Caller, method: str, path: str, org: str) -> None:
    slug = stranger.org_slug if org == "foreign" else "nowhere"
    answer = caller.call(method, path, params={"orgSlug": slug}, json=BODIES.get((method, path)))
    assert_error(answer, 403, "forbidden")


@pytest.mark.parametrize(("method", "path"), SCOPED)
def test_unknown_project_is_404_and_says_how_to_recover(caller: Caller, method: str, path: str) -> None:
    answer = caller.call(method, path, params={"projectSlug": "wiped"}, json=BODIES.get((method, path)))
    assert ".arkor/state.json" in assert_error(answer, 404, "not_found")["error"]


@pytest.mark.parametrize(("method", "path"), SCOPED)
@pytest.mark.parametrize("missing", ["orgSlug", "projectSlug"])
def test_scope_must_be_in_the_query(caller: Caller, method: str, path: str, missing: str) -> None:
    params = {name: value for name, value in caller.scope.items() if name != missing}
    answer = caller.http.request(method, path, params=params, headers=caller.auth, json=BODIES.get((method, path)))
    assert missing in assert_error(answer, 400, "invalid_request")["error"]


# Getting in


@pytest.mark.parametrize("kind", ["cli", "web", None])
def test_anonymous_token_has_every_field_and_an_org_of_its_own(caller: Caller, kind: str | None) -> None:
    answers = [caller.http.post("/v1/auth/anonymous", json={"kind": kind} if kind else None) for _ in range(2)]
    for answer in answers:
        assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
        made = answer.json()
        assert {"token", "anonymousId", "kind", "personalOrg"} <= set(made) and made["kind"] == (kind or "cli")
        assert {"id", "slug", "name"} <= set(made["personalOrg"])
        assert all(isinstance(value, str) and value for value in made["personalOrg"].values())
    first, second = (answer.json() for answer in answers)
    for name in ("token", "anonymousId"):
        assert first[name] != second[name]
    assert first["personalOrg"]["slug"] != second["personalOrg"]["slug"]


def test_cli_config_says_that_there_is_no_oauth(service: RunningService) -> None:
    answer = httpx.get(f"{service.url}/v1/auth/cli/config")
    assert answer.status_code == 200
    assert answer.json() == {"auth0Domain": None, "clientId": None, "audience": None, "callbackPorts": []}


def test_me_lists_the_callers_orgs(caller: Caller) -> None:
    me = caller.http.get("/v1/me", headers=caller.auth).json()
    assert isinstance(me["user"], dict) and me["user"]["kind"] == "anonymous"
    [org] = me["orgs"]
    assert {**org, "name": ""} == {"id": caller.org_id, "slug": caller.org_slug, "name": ""}
