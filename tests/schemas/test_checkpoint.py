"""The manifest: what is stored is what was hashed, and nothing else passes for one."""

from __future__ import annotations

import hashlib
import json

import pytest
from pydantic import ValidationError

from arkor_ray.errors import AdapterError
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.checkpoint import CheckpointManifest, ManifestFile, ParityProbe

MANIFEST = CheckpointManifest(
    adapter_id="job-step-2",
    job_id="job",
    step=2,
    base_model="base/model",
    base_precision="fp32",
    r=8,
    lora_alpha=16,
    target_modules=["q_proj"],
    metrics={"loss": None},
    files=[ManifestFile(path="adapter_model.safetensors", size_bytes=3, sha256="0" * 64)],
    probe=ParityProbe(token_ids=[1, 2], logprobs=[-0.1234567890123]),
    created_at=utcnow(),
)


def test_manifest_comes_back_byte_for_byte() -> None:
    again = CheckpointManifest.from_bytes(MANIFEST.to_bytes())
    assert again.to_bytes() == MANIFEST.to_bytes() and again.sha256 == MANIFEST.sha256
    assert MANIFEST.sha256 == hashlib.sha256(MANIFEST.to_bytes()).hexdigest()


def test_manifest_survives_a_database_that_stores_json() -> None:
    stored = json.loads(json.dumps(MANIFEST.model_dump(mode="json")))
    assert CheckpointManifest.model_validate(stored).sha256 == MANIFEST.sha256


def test_weights_are_found_by_name() -> None:
    assert MANIFEST.weights.size_bytes == 3


def test_manifest_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        MANIFEST.step = 3  # type: ignore[misc]


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", MANIFEST.to_bytes()[:-1], b'{"adapter_id": "x"}'])
def test_other_bytes_are_no_manifest(data: bytes) -> None:
    with pytest.raises(AdapterError, match="manifest"):
        CheckpointManifest.from_bytes(data)


def test_unknown_field_in_storage_is_refused() -> None:
    raw = {**json.loads(MANIFEST.to_bytes()), "extra": 1}
    with pytest.raises(AdapterError):
        CheckpointManifest.from_bytes(json.dumps(raw).encode())
