"""Errors: the contract's envelope whatever goes wrong, and nothing in it that is not for users."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy.exc import OperationalError

from arkor_ray.errors import ObjectNotFoundError, ServiceUnavailableError, TrainingError
from tests.api.conftest import CONFIG, User

pytestmark = pytest.mark.anyio

SECRET = "s3://bucket/secret at 10.0.0.7"


def assert_envelope(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body["code"] == code and body["error"].startswith(f"{code}: ")
    return body


async def test_unknown_route_is_404(user: User) -> None:
    for path in ("/v1/nothing", "/v1/completions", "/"):
        assert_envelope(await user.get(path), 404, "not_found")


async def test_unknown_method_is_405_with_the_allowed_ones(user: User) -> None:
    answer = await user.call("PUT", "/v1/jobs")
    assert_envelope(answer, 405, "method_not_allowed")
    assert {"GET", "POST"} & set(answer.headers["allow"].split(", "))


async def test_trailing_slash_is_never_redirected(user: User) -> None:
    for method, path in (("POST", "/v1/jobs/"), ("GET", "/v1/projects/"), ("GET", "/v1/me/")):
        assert_envelope(await user.call(method, path), 404, "not_found")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"{", "not valid JSON"),
        (b"", "must be"),
        (b"[]", "must be"),
        (b'"text"', "must be"),
        (b'{"name": "x", "config": {"a": NaN}}', "config.a: NaN is no number"),
        (b'{"name": "x", "config": {"a": -Infinity}}', "config.a: -Infinity is no number"),
        (b'{"name": "x", "config": {"a": NaN, "a": 1}}', "The body: NaN is no number"),
        (b'{"name": "x", "config": {"a": [1.5, {"b": 1e999}]}}', "config.a.1.b: 1e999 is too large"),
        (b'{"name": "x", "config": {"a": -1%s.0}}' % (b"0" * 500), "config.a: -1000"),
        (b"1e999", "The body: 1e999 is too large"),
        (b'{"name": "x\\u0000", "config": {}}', "name: has a NUL"),
        (b'{"name": "x", "config": {"\\ud800": 1}}', "config: the name of a field in it: has a NUL"),
        (b'{"name": "x", "config": {"a": ["\\udfff"]}}', "config.a.0: has a NUL character or half a surrogate"),
        (b'{"name": "\xff", "config": {}}', "UTF-8"),
        ('{"name": "x\\u0000", "config": {}}'.encode("utf-16"), "UTF-8"),
        ('{"name": "x\\u0000", "config": {}}'.encode("utf-16-be"), "UTF-8"),
        ('{"name": "x\\u0000", "config": {}}'.encode("utf-32-le"), "UTF-8"),
        (b"[" * 100_000, "deep"),
        (b"1" * 5000, "body"),
    ],
    ids=lambda value: str(value[:40]),
)
async def test_body_that_is_not_the_json_we_mean_is_400(user: User, body: bytes, what: str) -> None:
    answer = await user.call("POST", "/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert what.lower() in assert_envelope(answer, 400, "invalid_request")["error"].lower()


async def test_value_that_cannot_be_stored_is_named(user: User) -> None:
    content = b'{"name": "x", "config": {"plan": {"budget": 1e999}}}'
    answer = await user.call("POST", "/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert assert_envelope(answer, 400, "invalid_request")["param"] == "config.plan.budget"


async def test_byte_order_mark_is_let_pass(user: User) -> None:
    content = b"\xef\xbb\xbf" + json.dumps({"name": "käse", "config": CONFIG}, ensure_ascii=False).encode()
    answer = await user.call("POST", "/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert answer.json()["job"]["name"] == "käse"


async def test_numbers_are_kept_as_they_came(user: User) -> None:
    content = b'{"name": "x", "config": {"a": [1.5, -2e-3, 1E5, 1e-999], %s' % json.dumps(CONFIG).encode()[1:] + b"}"
    answer = await user.call("POST", "/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert answer.json()["job"]["config"]["a"] == [1.5, -0.002, 100000.0, 0.0]


async def test_surrogate_pairs_are_fine(user: User) -> None:
    content = b'{"name": "\\ud83d\\ude00", "config": %s}' % json.dumps(CONFIG).encode()
    answer = await user.call("POST", "/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert answer.json()["job"]["name"] == "😀"


async def test_json_without_a_content_type_is_read(user: User) -> None:
    request = user.http.build_request(
        "POST", "/v1/projects", params=user.scope, headers=user.auth, content=b'{"name": "x", "slug": "y"}'
    )
    assert "content-type" not in request.headers
    assert (await user.http.send(request)).status_code == 201


async def test_other_content_types_are_refused_with_a_reason(user: User) -> None:
    answer = await user.call("POST", "/v1/projects", data={"name": "x"})
    assert "application/json" in assert_envelope(answer, 400, "invalid_request")["error"]


async def test_field_of_the_body_is_named(user: User) -> None:
    body = assert_envelope(await user.post("/v1/projects", {"name": "x"}), 400, "invalid_request")
    assert body["param"] == "slug" and "slug" in body["error"]


async def test_missing_scope_is_named(user: User) -> None:
    answer = await user.http.get("/v1/projects", headers=user.auth)
    assert assert_envelope(answer, 400, "invalid_request")["param"] == "orgSlug"
    answer = await user.http.get("/v1/jobs", headers=user.auth, params={"orgSlug": user.org_slug})
    assert assert_envelope(answer, 400, "invalid_request")["param"] == "projectSlug"


async def test_body_over_the_limit_is_413(user: User) -> None:
    limit = user.app.state.services.settings.max_body_bytes
    answer = await user.post("/v1/jobs", {"name": "x" * limit, "config": {}})
    assert_envelope(answer, 413, "payload_too_large")
    assert answer.headers["connection"] == "close"


async def test_body_over_the_limit_that_hides_its_length_is_413(user: User) -> None:
    limit = user.app.state.services.settings.max_body_bytes
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 16
            yield b" " * (1 << 16)

    answer = await user.call("POST", "/v1/jobs", content=endless())
    assert_envelope(answer, 413, "payload_too_large")
    assert sent < limit + (2 << 16)


async def test_body_at_the_limit_is_read(user: User) -> None:
    limit = user.app.state.services.settings.max_body_bytes
    frame = len(b'{"name": "", "slug": "y"}')
    answer = await user.call(
        "POST", "/v1/projects", content=b'{"name": "%s", "slug": "y"}' % (b"x" * (limit - frame)),
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    assert assert_envelope(answer, 400, "invalid_request")["param"] == "name"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RuntimeError(SECRET), 500, "internal_error"),
        (TrainingError(SECRET), 500, "internal_error"),
        (ObjectNotFoundError(SECRET), 503, "storage_error"),
        (OperationalError("SELECT secret", {}, Exception(SECRET)), 503, "unavailable"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_fault_of_ours_shows_no_detail(
    app: FastAPI, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, error: Exception, status: int, code: str
) -> None:
    @app.get("/v1/fault")
    def fault() -> None:
        raise error

    answer = await http.get("/v1/fault")
    body = assert_envelope(answer, status, code)
    assert "secret" not in answer.text and "10.0.0.7" not in answer.text
    number = body["error"].partition("(error ")[2].split(" ")[0]
    assert number and any(number in record.message for record in caplog.records)


async def test_unavailable_part_says_when_to_come_back(app: FastAPI, http: httpx.AsyncClient) -> None:
    @app.get("/v1/away")
    def away() -> None:
        raise ServiceUnavailableError("The model is loading", retry_after=7)

    answer = await http.get("/v1/away")
    assert "The model is loading" in assert_envelope(answer, 503, "unavailable")["error"]
    assert answer.headers["retry-after"] == "7"


async def test_unfit_ids_are_not_found_rather_than_a_fault(user: User) -> None:
    for job_id in ("%00", "%20", "a" * 500, "%ff"):
        answer = await user.get(f"/v1/jobs/{job_id}")
        assert answer.status_code in (400, 404), answer.text


async def test_cancel_needs_no_body_and_no_content_type(user: User) -> None:
    job_id = await user.create_job()
    request = user.http.build_request("POST", f"/v1/jobs/{job_id}/cancel", params=user.scope, headers=user.auth)
    assert "content-type" not in request.headers
    assert (await user.http.send(request)).status_code == 200


async def test_error_of_a_user_is_his_to_read(user: User) -> None:
    answer = await user.post("/v1/jobs", {"name": "x", "config": {**CONFIG, "maxSteps": 0}})
    body = assert_envelope(answer, 400, "invalid_request")
    assert body["param"] == "config.maxSteps" and "(got 0)" in body["error"]
