"""Checkpoints over HTTP: listing them, their manifests, their files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from arkor_ray.schemas.checkpoint import Checkpoint, CheckpointManifest
from tests.api.conftest import WEIGHTS, Training, User

pytestmark = pytest.mark.anyio


@pytest.fixture
async def job_id(user: User, training: Training) -> str:
    """A completed job with checkpoints at steps 10 and 2, and a final adapter."""
    made = await user.create_job()
    training.start(made)
    for step in (10, 2):
        training.save(made, step)
    training.complete(made, step=12)
    return made


async def test_list_is_by_step_with_the_final_adapter_last(user: User, job_id: str) -> None:
    listed = (await user.get(f"/v1/jobs/{job_id}/checkpoints")).json()["checkpoints"]
    assert [(c["step"], c["kind"]) for c in listed] == [(2, "checkpoint"), (10, "checkpoint"), (12, "final")]
    assert listed[0]["adapterId"] == f"{job_id}-step-2" and listed[0]["ready"] is True
    assert listed[0]["metrics"] == {"loss": 1.0}
    assert [Checkpoint.model_validate(c).job_id for c in listed] == [job_id] * 3


async def test_job_without_checkpoints_has_an_empty_list(user: User) -> None:
    job_id = await user.create_job()
    assert (await user.get(f"/v1/jobs/{job_id}/checkpoints")).json() == {"checkpoints": []}


@pytest.mark.parametrize(("ref", "step"), [("2", 2), ("10", 10), ("final", 12)])
async def test_checkpoint_comes_with_its_manifest(user: User, job_id: str, ref: str, step: int) -> None:
    body = (await user.get(f"/v1/jobs/{job_id}/checkpoints/{ref}")).json()
    manifest = CheckpointManifest.model_validate(body["manifest"])
    assert manifest.step == body["checkpoint"]["step"] == step
    assert manifest.sha256 == body["checkpoint"]["manifestSha256"], "what is shown is what was hashed"


@pytest.mark.parametrize("ref", ["3", "12", "-1", "2.0", "last", "%20", "9" * 30])
async def test_unknown_checkpoint_is_404(user: User, job_id: str, ref: str) -> None:
    answer = await user.get(f"/v1/jobs/{job_id}/checkpoints/{ref}")
    assert answer.status_code == 404 and answer.json()["code"] == "not_found"


async def test_file_is_downloaded_whole(user: User, job_id: str) -> None:
    answer = await user.get(f"/v1/jobs/{job_id}/checkpoints/final/files/adapter_model.safetensors")
    assert answer.status_code == 200 and answer.content == WEIGHTS
    assert answer.headers["content-length"] == str(len(WEIGHTS))
    nested = await user.get(f"/v1/jobs/{job_id}/checkpoints/2/files/nested/tokenizer.json")
    assert nested.content == b"[]"


async def test_urls_of_artifacts_lead_to_the_files(user: User, job_id: str) -> None:
    """They carry no scope, since slugs may change; the token decides."""
    [first, *_] = (await user.get(f"/v1/jobs/{job_id}/checkpoints")).json()["checkpoints"]
    artifact = first["artifacts"][0]
    assert artifact["pathname"] == "adapter_model.safetensors" and artifact["sizeBytes"] == len(WEIGHTS)
    url = urlsplit(artifact["url"])
    assert url.scheme == "http"
    assert (await user.http.get(url.path, headers=user.auth)).content == WEIGHTS
    assert (await user.http.get(url.path)).status_code == 401


async def test_url_of_a_foreign_artifact_is_404(user: User, job_id: str, login: Callable[[], Any]) -> None:
    other: User = await login()
    path = f"/v1/jobs/{job_id}/checkpoints/2/files/adapter_model.safetensors"
    assert (await user.http.get(path, headers=other.auth)).status_code == 404
    half = await user.http.get(path, headers=user.auth, params={"orgSlug": user.org_slug})
    assert half.status_code == 404, "half a scope is not none"


@pytest.mark.parametrize(
    "path",
    ["manifest.json", "nothing", "../2/files/x", "..%2f..%2farkor.db", "/etc/passwd", "nested", "%00", ""],
)
async def test_only_files_of_the_manifest_can_be_had(user: User, job_id: str, path: str) -> None:
    answer = await user.get(f"/v1/jobs/{job_id}/checkpoints/2/files/{path}")
    assert answer.status_code == 404


async def test_lost_object_is_a_fault_of_the_store(user: User, training: Training, job_id: str) -> None:
    training._store.delete(f"adapters/{job_id}-step-2/adapter_config.json")
    answer = await user.get(f"/v1/jobs/{job_id}/checkpoints/2/files/adapter_config.json")
    assert answer.status_code == 503 and answer.json()["code"] == "storage_error"
