"""Endpoints on the wire: publishing, keys, the public route by path and by host."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.contract.conftest import ANSWER, DOMAIN, QUESTION, STEPS, Recorded
from tests.contract.wire import (
    ISO,
    UNKNOWN_ID,
    UUID,
    Caller,
    assert_error,
    exchange,
    new_slug,
    request_bytes,
    text_of,
)
from tests.servers.arkor import RunningService

pytestmark = pytest.mark.integration

BASE = {"kind": "base_model", "baseModel": "tiny"}
CHAT = {"model": "ignored", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 32}
REQUIRED = {
    "id": str, "slug": str, "orgId": str, "projectId": str, "target": dict, "authMode": str, "urlFormat": str,
    "enabled": bool, "createdAt": str, "updatedAt": str,
}  # fmt: skip


def assert_deployment(endpoint: dict[str, Any], caller: Caller) -> None:
    """What the client's schema asks; one bad row makes its whole list call fail."""
    for name, kind in REQUIRED.items():
        assert isinstance(endpoint[name], kind), name
    assert UUID.fullmatch(endpoint["id"]) and endpoint["orgId"] == caller.org_id
    assert endpoint["authMode"] in ("none", "fixed_api_key") and endpoint["urlFormat"] == "openai_compat"
    assert endpoint["customDomain"] is None
    assert "runRetentionMode" not in endpoint or isinstance(endpoint["runRetentionMode"], str)
    assert ("runRetentionDays" in endpoint) == (endpoint.get("runRetentionMode") == "days")
    assert ISO.fullmatch(endpoint["createdAt"]) and ISO.fullmatch(endpoint["updatedAt"])
    target = endpoint["target"]
    if target["kind"] == "adapter":
        assert target["adapter"]["kind"] in ("final", "checkpoint")
    else:
        assert set(target) == {"kind", "baseModel"}


def ask(service: RunningService, slug: str, key: str | None = None, *, host: bool = False, **fields: Any) -> Any:
    """One answer of the public route."""
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    if host:
        headers["Host"] = f"{slug}.{DOMAIN}"
    path = "/v1/chat/completions" if host else f"/e/{slug}/v1/chat/completions"
    return httpx.post(service.url + path, json={**CHAT, **fields}, headers=headers, timeout=60)


def assert_openai_error(answer: httpx.Response, status: int, kind: str = "invalid_request_error") -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == kind
    return error


@pytest.mark.parametrize("kind", ["final", "checkpoint", "base_model"])
@pytest.mark.parametrize("host", [False, True])
def test_published_target_answers_and_is_listed(
    service: RunningService, finished: Recorded, caller: Caller, kind: str, host: bool
) -> None:
    adapter = {"final": finished.final, "checkpoint": finished.checkpoint(STEPS)}.get(kind)
    target = {"kind": "adapter", "adapter": adapter} if adapter else BASE
    made = caller.create_endpoint(target)
    assert_deployment(made, caller)
    assert made["target"] == target and made["enabled"] is True
    answer = ask(service, made["slug"], host=host).json()
    if adapter:
        assert answer["choices"][0]["message"]["content"] == ANSWER
        suffix = "final" if kind == "final" else f"step-{STEPS}"
        assert answer["system_fingerprint"].startswith(f"{finished.id}-{suffix}@")
    assert "content" not in answer, "the text on top is of the arkor wire alone"
    assert made == caller.get(f"/v1/endpoints/{made['id']}").json()["deployment"]
    assert made in caller.get("/v1/endpoints").json()["deployments"]


def test_unknown_fields_of_a_request_are_no_error(caller: Caller) -> None:
    made = caller.create_endpoint(BASE, note={"of": "tomorrow"})
    changed = caller.patch(f"/v1/endpoints/{made['id']}", {"enabled": True, "note": "x"})
    assert changed.status_code == 200
    assert_deployment(changed.json()["deployment"], caller)


def test_list_has_only_rows_that_the_client_accepts(caller: Caller, finished: Recorded) -> None:
    for retention in ({"runRetentionMode": "unlimited"}, {"runRetentionMode": "days", "runRetentionDays": 3}):
        caller.create_endpoint({"kind": "adapter", "adapter": finished.final}, **retention)
    listed = caller.get("/v1/endpoints").json()["deployments"]
    assert len(listed) >= 2
    for endpoint in listed:
        assert_deployment(endpoint, caller)


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"slug": "A"}, 400, "slug"),
        ({"slug": "a"}, 400, "slug"),
        ({"slug": "-ab"}, 400, "slug"),
        ({"slug": "ab-"}, 400, "slug"),
        ({"slug": "x" * 51}, 400, "slug"),
        ({"slug": "api"}, 400, "slug"),
        ({"slug": "v1"}, 400, "slug"),
        ({"authMode": "open"}, 400, "authMode"),
        ({"authMode": None}, 400, "authMode"),
        ({"target": None}, 400, "target"),
        ({"target": {"kind": "model_menu"}}, 400, "target"),
        ({"target": {"kind": "base_model", "baseModel": "no/such"}}, 400, "target.baseModel"),
        ({"target": {"kind": "adapter", "adapter": {"kind": "final", "jobId": UNKNOWN_ID}}}, 404, "target.adapter"),
        ({"runRetentionMode": "days"}, 400, "runRetentionDays"),
        ({"runRetentionMode": "days", "runRetentionDays": 0}, 400, "runRetentionDays"),
        ({"runRetentionMode": "unlimited", "runRetentionDays": 3}, 400, "runRetentionDays"),
        ({"runRetentionDays": 3}, 400, "runRetentionDays"),
        ({"runRetentionMode": "never"}, 400, "runRetentionMode"),
    ],
)
def test_endpoint_that_cannot_be_is_refused(caller: Caller, fields: dict[str, Any], status: int, named: str) -> None:
    body = {"slug": new_slug(), "target": BASE, "authMode": "none", **fields}
    assert assert_error(caller.post("/v1/endpoints", body), status)["param"].startswith(named)


def test_slug_is_unique_over_all_orgs_until_its_endpoint_is_deleted(
    service: RunningService, caller: Caller, stranger: Caller
) -> None:
    made = caller.create_endpoint(BASE)
    body = {"slug": made["slug"], "target": BASE, "authMode": "none"}
    for who in (caller, stranger):
        assert "taken" in assert_error(who.post("/v1/endpoints", body), 409, "conflict")["error"]
    assert caller.patch(f"/v1/endpoints/{made['id']}", {"enabled": False}).status_code == 200
    assert stranger.post("/v1/endpoints", body).status_code == 409, "a disabled one keeps its slug"
    scope = f"orgSlug={caller.org_slug}&projectSlug={caller.project_slug}"
    [deleted] = exchange(
        service.url,
        request_bytes("DELETE", f"/v1/endpoints/{made['id']}?{scope}", f"Authorization: Bearer {caller.token}"),
    )
    assert deleted.status_line == "HTTP/1.1 204 No Content" and deleted.body == b""
    assert deleted.headers.get("content-length", "0") == "0"
    assert_error(caller.get(f"/v1/endpoints/{made['id']}"), 404)
    assert stranger.post("/v1/endpoints", body).status_code == 201


def test_patch_changes_what_it_names_and_no_more(caller: Caller, finished: Recorded) -> None:
    made = caller.create_endpoint(BASE, authMode="fixed_api_key")
    path, known = f"/v1/endpoints/{made['id']}", dict(made)
    for change in (
        {"enabled": False},
        {"enabled": True},
        {"authMode": "none"},
        {"target": {"kind": "adapter", "adapter": finished.final}},
        {"runRetentionMode": "disabled"},
    ):
        answer = caller.patch(path, change)
        assert answer.status_code == 200
        changed = answer.json()["deployment"]
        assert_deployment(changed, caller)
        known |= {**change, "updatedAt": changed["updatedAt"]}
        if "runRetentionMode" in change:
            known.pop("runRetentionDays")
        assert changed == known
    assert_error(caller.patch(path, {"slug": "other"}), 400)


def test_key_is_shown_once_and_opens_its_endpoint_until_it_is_revoked(service: RunningService, caller: Caller) -> None:
    made = caller.create_endpoint(BASE, authMode="fixed_api_key")
    path = f"/v1/endpoints/{made['id']}/keys"
    answer = caller.post(path, {"label": "  my key  "})
    assert answer.status_code == 201
    key = answer.json()["key"]
    assert set(key) == {"id", "label", "plaintext", "prefix", "createdAt"} and key["label"] == "my key"
    assert key["plaintext"].startswith("ark_live_") and key["plaintext"][:17] == key["prefix"]
    assert len(key["plaintext"]) >= 9 + 43, "32 bytes of entropy"

    assert ask(service, made["slug"], key["plaintext"], max_tokens=1).status_code == 200
    url = f"{service.url}/e/{made['slug']}/v1"
    assert httpx.get(f"{url}/models", headers={"x-api-key": key["plaintext"]}).status_code == 200
    for wrong in (None, "ark_live_wrong", key["prefix"], caller.token):
        assert_openai_error(ask(service, made["slug"], wrong), 401, "authentication_error")
    assert_error(caller.http.get("/v1/me", headers={"Authorization": f"Bearer {key['plaintext']}"}), 401)

    listed = caller.get(path)
    assert key["plaintext"] not in listed.text
    [row] = listed.json()["keys"]
    assert row["enabled"] is True and {"id", "label", "prefix", "enabled", "createdAt"} <= set(row)
    assert row["lastUsedAt"] is None or ISO.fullmatch(row["lastUsedAt"])
    deleted = caller.delete(f"{path}/{key['id']}")
    assert deleted.status_code == 204 and deleted.content == b""
    [row] = caller.get(path).json()["keys"]
    assert row["enabled"] is False
    assert_openai_error(ask(service, made["slug"], key["plaintext"]), 401, "authentication_error")


@pytest.mark.parametrize("label", ["", "   ", "x" * 81, None, 5])
def test_unfit_label_of_a_key_is_400(caller: Caller, label: Any) -> None:
    made = caller.create_endpoint(BASE)
    assert assert_error(caller.post(f"/v1/endpoints/{made['id']}/keys", {"label": label}), 400)["param"] == "label"


@pytest.mark.parametrize("host", [False, True])
def test_disabled_endpoint_answers_like_an_unknown_one(service: RunningService, caller: Caller, host: bool) -> None:
    made = caller.create_endpoint(BASE)
    assert ask(service, made["slug"], host=host, max_tokens=1).status_code == 200
    assert caller.patch(f"/v1/endpoints/{made['id']}", {"enabled": False}).status_code == 200
    unknown = new_slug()
    disabled, missing = ask(service, made["slug"], host=host), ask(service, unknown, host=host)
    assert_openai_error(disabled, 404)
    assert disabled.text.replace(made["slug"], "SLUG") == missing.text.replace(unknown, "SLUG")


@pytest.mark.parametrize("host", [False, True])
def test_public_stream_is_openais(service: RunningService, finished: Recorded, caller: Caller, host: bool) -> None:
    made = caller.create_endpoint({"kind": "adapter", "adapter": finished.final})
    answer = ask(service, made["slug"], "dummy", host=host, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert text_of(answer.content) == ANSWER and b"event:" not in answer.content


def test_host_of_an_endpoint_leads_to_nothing_else(service: RunningService, caller: Caller) -> None:
    made = caller.create_endpoint(BASE)
    token = f"Authorization: Bearer {caller.token}"
    for path in ("/v1/me", f"/v1/jobs?orgSlug={caller.org_slug}", "/openapi.json", "/../v1/me", "//v1/me", "/healthz"):
        [answer] = exchange(service.url, request_bytes("GET", path, token, host=f"{made['slug']}.{DOMAIN}"))
        assert answer.status == 404, path
        assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "no"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"guided_regex": "("}, "guided_regex"),
    ],
)
def test_bad_public_request_names_the_field_in_openais_spelling(
    service: RunningService, caller: Caller, fields: dict[str, Any], param: str
) -> None:
    made = caller.create_endpoint(BASE)
    error = assert_openai_error(ask(service, made["slug"], **fields), 400)
    assert error["param"].startswith(param) and param in error["message"]
