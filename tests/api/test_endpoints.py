"""Publishing endpoints: what they may serve, what clients see of them, and that nothing is switched before it can answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from arkor_ray.errors import AdapterError, ServiceUnavailableError
from arkor_ray.settings import Settings
from tests.api.conftest import FakeGateway, Training, User
from tests.db.databases import both

pytestmark = pytest.mark.anyio

BASE = {"kind": "base_model", "baseModel": "Tiny"}
OPEN = {"slug": "triage", "target": BASE, "authMode": "none"}
FIELDS = {
    "id", "slug", "orgId", "projectId", "target", "authMode", "urlFormat", "enabled", "customDomain", "runRetentionMode",
    "runRetentionDays", "createdAt", "updatedAt", "url",
}  # fmt: skip


def adapter(job_id: str, step: int | None = None) -> dict[str, Any]:
    of_job = (
        {"kind": "final", "jobId": job_id} if step is None else {"kind": "checkpoint", "jobId": job_id, "step": step}
    )
    return {"kind": "adapter", "adapter": of_job}


@pytest.fixture
async def job_id(user: User, training: Training) -> str:
    """A completed job with a checkpoint at 2 and a final adapter."""
    made = await user.create_job()
    training.save(made, 2)
    training.complete(made)
    return made


@both
async def test_life_of_an_endpoint(user: User, job_id: str) -> None:
    made = await user.create_endpoint(target=adapter(job_id))
    assert set(made) == FIELDS
    assert made["target"] == adapter(job_id) and made["authMode"] == "fixed_api_key"
    assert (made["urlFormat"], made["enabled"], made["customDomain"]) == ("openai_compat", True, None)
    assert (made["runRetentionMode"], made["runRetentionDays"]) == ("days", 7)
    assert made["createdAt"].endswith("Z")
    path = f"/v1/endpoints/{made['id']}"
    assert (await user.get(path)).json() == {"deployment": made}
    assert (await user.get("/v1/endpoints")).json() == {"deployments": [made]}
    changes = {"target": adapter(job_id, 2), "authMode": "none", "enabled": False, "runRetentionMode": "unlimited"}
    answer = await user.patch(path, changes)
    assert answer.status_code == 200
    changed = answer.json()["deployment"]
    assert set(changed) == FIELDS - {"runRetentionDays"}, "days are left out, never null"
    assert {**changed, **changes} == changed
    assert changed["updatedAt"] > made["updatedAt"] and changed["createdAt"] == made["createdAt"]
    answer = await user.delete(path)
    assert answer.status_code == 204 and answer.content == b""
    assert (await user.get(path)).status_code == 404
    assert (await user.get("/v1/endpoints")).json() == {"deployments": []}


@both
async def test_keys_of_an_endpoint(user: User) -> None:
    path = f"/v1/endpoints/{(await user.create_endpoint())['id']}/keys"
    answer = await user.post(path, {"label": "  ci "})
    assert answer.status_code == 201
    key = answer.json()["key"]
    assert set(key) == {"id", "label", "plaintext", "prefix", "createdAt"}
    assert key["label"] == "ci" and len(key["prefix"]) == 17
    assert key["plaintext"].startswith(key["prefix"]) and key["prefix"].startswith("ark_live_")
    listed = await user.get(path)
    assert key["plaintext"] not in listed.text
    shown = {name: key[name] for name in ("id", "label", "prefix", "createdAt")}
    assert listed.json() == {"keys": [{**shown, "enabled": True, "lastUsedAt": None}]}
    answer = await user.delete(f"{path}/{key['id']}")
    assert answer.status_code == 204 and answer.content == b""
    assert (await user.get(path)).json() == {"keys": [{**shown, "enabled": False, "lastUsedAt": None}]}
    assert (await user.delete(f"{path}/none")).status_code == 404


async def test_switching_the_auth_mode_leaves_keys_alone(user: User) -> None:
    path = f"/v1/endpoints/{(await user.create_endpoint())['id']}"
    await user.post(f"{path}/keys", {"label": "x"})
    for mode in ("none", "fixed_api_key"):
        await user.patch(path, {"authMode": mode})
        assert [key["enabled"] for key in (await user.get(f"{path}/keys")).json()["keys"]] == [True]


async def test_patch_keeps_what_it_does_not_name(user: User) -> None:
    made = await user.create_endpoint(runRetentionMode="days", runRetentionDays=30)
    changed = (await user.patch(f"/v1/endpoints/{made['id']}", {"authMode": "none"})).json()["deployment"]
    assert changed == {**made, "authMode": "none", "updatedAt": changed["updatedAt"]}


async def test_url_is_that_of_the_path_or_of_the_host(user: User, settings: Settings) -> None:
    assert (await user.create_endpoint())["url"] == f"{settings.api_url}/e/triage/v1"
    services = user.app.state.services
    settings = settings.model_copy(update={"endpoints_domain": "models.example.com"})
    user.app.state.services = type(services)(**{**vars(services), "settings": settings})
    [listed] = (await user.get("/v1/endpoints")).json()["deployments"]
    assert listed["url"] == f"http://triage.models.example.com:{settings.port}/v1"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"slug": "www"}, "slug"),
        ({"slug": "Triage"}, "slug"),
        ({"authMode": "open"}, "authMode"),
        ({"target": {"kind": "model_menu"}}, "target"),
        ({"target": {"kind": "base_model", "baseModel": "nowhere/such"}}, "target.baseModel"),
        ({"target": adapter("j", -1)}, "target.adapter.step"),
        ({"runRetentionDays": 7}, "runRetentionDays"),
        ({"runRetentionMode": "days"}, "runRetentionDays"),
    ],
)
async def test_unfit_body_is_400_by_the_field_at_fault(
    user: User, gateway: FakeGateway, change: dict[str, Any], param: str
) -> None:
    answer = await user.post("/v1/endpoints", {**OPEN, **change})
    assert answer.status_code == 400 and answer.json()["param"] == param
    assert gateway.prepared == []
    endpoint = await user.create_endpoint()
    answer = await user.patch(f"/v1/endpoints/{endpoint['id']}", change)
    assert answer.status_code == 400 and answer.json()["param"] == param
    assert (await user.get("/v1/endpoints")).json() == {"deployments": [endpoint]}


async def test_slug_cannot_be_changed(user: User) -> None:
    endpoint = await user.create_endpoint()
    answer = await user.patch(f"/v1/endpoints/{endpoint['id']}", {"slug": "other", "enabled": False})
    assert answer.status_code == 400 and "immutable" in answer.json()["error"]
    assert (await user.get(f"/v1/endpoints/{endpoint['id']}")).json()["deployment"] == endpoint


async def test_label_of_a_key_must_say_something(user: User) -> None:
    path = f"/v1/endpoints/{(await user.create_endpoint())['id']}/keys"
    for label in ("   ", "x" * 81):
        assert (await user.post(path, {"label": label})).json()["param"] == "label"


@both
async def test_slug_is_taken_for_everybody_until_it_is_deleted(user: User, gateway: FakeGateway, login: Any) -> None:
    other: User = await login()
    taken = await other.create_endpoint()
    await other.patch(f"/v1/endpoints/{taken['id']}", {"enabled": False})
    gateway.prepared.clear()
    answer = await user.post("/v1/endpoints", OPEN)
    assert answer.status_code == 409 and "Deployment slug is already taken" in answer.json()["error"]
    assert gateway.prepared == [], "refused before anything is loaded for it"
    await other.delete(f"/v1/endpoints/{taken['id']}")
    assert (await user.post("/v1/endpoints", OPEN)).status_code == 201


@both
async def test_of_many_creations_of_one_slug_at_once_one_wins(user: User) -> None:
    answers = await asyncio.gather(*(user.post("/v1/endpoints", OPEN) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409, 409]


async def test_final_adapter_of_a_running_job_cannot_be_served_yet(user: User, training: Training) -> None:
    job_id = await user.create_job()
    training.start(job_id)
    training.save(job_id, 2)
    answer = await user.post("/v1/endpoints", {**OPEN, "target": adapter(job_id)})
    assert answer.status_code == 409 and "steps 2" in answer.json()["error"]
    assert answer.json()["param"] == "target.adapter"
    assert (await user.post("/v1/endpoints", {**OPEN, "target": adapter(job_id, 2)})).status_code == 201


async def test_adapter_that_a_job_does_not_have_is_404(user: User, job_id: str) -> None:
    endpoint = await user.create_endpoint("other")
    for target in (adapter(job_id, 3), adapter(job_id, 10**12), adapter("none"), adapter("../x")):
        for answer in (
            await user.post("/v1/endpoints", {**OPEN, "target": target}),
            await user.patch(f"/v1/endpoints/{endpoint['id']}", {"target": target}),
        ):
            assert answer.status_code == 404 and answer.json()["param"] == "target.adapter"


async def test_target_is_ready_to_answer_before_anything_points_to_it(
    user: User, gateway: FakeGateway, job_id: str
) -> None:
    endpoint = await user.create_endpoint(target=adapter(job_id, 2))
    path = f"/v1/endpoints/{endpoint['id']}"
    await user.patch(path, {"target": adapter(job_id)})
    await user.patch(path, {"target": BASE})
    assert gateway.prepared == [f"{job_id}-step-2", f"{job_id}-final", "base/tiny"]
    gateway.prepared.clear()
    await user.patch(path, {"enabled": True, "authMode": "none"})
    await user.patch(path, {"enabled": False})
    assert gateway.prepared == [], "nothing is loaded for what was there before"
    await user.patch(path, {"enabled": True})
    assert gateway.prepared == ["base/tiny"]


@pytest.mark.parametrize(
    ("error", "status"), [(AdapterError("made for another base"), 409), (ServiceUnavailableError("no room"), 503)]
)
async def test_target_that_cannot_be_served_changes_nothing(
    user: User, gateway: FakeGateway, job_id: str, error: Exception, status: int
) -> None:
    endpoint = await user.create_endpoint()
    path = f"/v1/endpoints/{endpoint['id']}"
    disabled = (await user.patch(path, {"enabled": False})).json()["deployment"]
    gateway.refuse_to_prepare(error)
    for change in ({"target": adapter(job_id)}, {"enabled": True}, {"enabled": True, "target": adapter(job_id)}):
        assert (await user.patch(path, change)).status_code == status
    assert (await user.post("/v1/endpoints", {**OPEN, "slug": "second"})).status_code == status
    assert (await user.get("/v1/endpoints")).json() == {"deployments": [disabled]}


async def test_request_that_has_resolved_its_target_keeps_it(user: User, job_id: str) -> None:
    directory = user.app.state.services.endpoints
    endpoint = await user.create_endpoint(target=adapter(job_id, 2))
    in_flight = await directory.find("triage")
    await user.patch(f"/v1/endpoints/{endpoint['id']}", {"target": adapter(job_id)})
    assert in_flight.adapter_id == f"{job_id}-step-2"
    assert (await directory.find("triage")).adapter_id == f"{job_id}-final"


async def test_endpoint_that_is_deleted_while_its_target_loads_is_404(
    user: User, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = await user.create_endpoint()
    path = f"/v1/endpoints/{endpoint['id']}"

    async def delete_meanwhile(*_: Any) -> None:
        assert (await user.delete(path)).status_code == 204

    monkeypatch.setattr(gateway, "prepare", delete_meanwhile)
    assert (await user.patch(path, {"target": BASE})).status_code == 404
    monkeypatch.undo()
    assert (await user.post("/v1/endpoints", OPEN)).status_code == 201


async def test_unknown_fields_are_ignored(user: User) -> None:
    endpoint = await user.create_endpoint(expiresAt=None, someday=1, target={**BASE, "extra": 1})
    assert endpoint["target"] == BASE and "someday" not in endpoint


async def test_management_token_is_no_key_and_a_key_no_token(user: User) -> None:
    endpoint = await user.create_endpoint()
    key = (await user.post(f"/v1/endpoints/{endpoint['id']}/keys", {"label": "x"})).json()["key"]
    user.token = key["plaintext"]
    assert (await user.get("/v1/endpoints")).status_code == 401
