"""A checkpoint's manifest: the commit marker of an adapter folder, and all that serving needs to know to trust it."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field, ValidationError

from arkor_ray.errors import AdapterError
from arkor_ray.schemas.base import StoredModel, Timestamp, WireModel

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

BasePrecision = Literal["fp32", "bf16", "fp16", "nf4"]


class ManifestFile(StoredModel):
    path: str = Field(description="Relative to the adapter's folder.")
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: str, data: bytes) -> ManifestFile:
        return cls(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def is_of(self, data: bytes) -> bool:
        """Whether these are the bytes that the entry was made of."""
        return hashlib.sha256(data).hexdigest() == self.sha256


class ParityProbe(StoredModel):
    """What the training model said about a few tokens at this step; serving must say the same."""

    token_ids: list[int]
    logprobs: list[float] = Field(
        description="log p(token_ids[i + 1] | token_ids[: i + 1]) in nats, one fewer than the ids."
    )


class CheckpointManifest(StoredModel):
    """Written last, with a conditional put. No manifest, no checkpoint; once written, never again."""

    adapter_id: str
    job_id: str
    step: int = Field(description="The weights are those after this many optimizer updates.")
    final: bool = False
    base_model: str = Field(
        description="The base's reference, with the revision where one was given: schemas/model.py."
    )
    base_revision: str | None = Field(default=None, description="The commit that the Hub gave for it.")
    base_precision: BasePrecision
    r: int
    lora_alpha: float
    target_modules: list[str]
    template_sha256: str | None = None
    metrics: dict[str, float | None] = {}
    files: list[ManifestFile]
    resume_prefix: str | None = None
    probe: ParityProbe | None = None
    created_at: Timestamp

    def to_bytes(self) -> bytes:
        """Canonical JSON: the bytes that are stored and hashed."""
        return self.model_dump_json(indent=1).encode()

    @property
    def sha256(self) -> str:
        """Hash of the stored bytes: the identity that caches and `system_fingerprint` carry."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def file(self, path: str) -> ManifestFile:
        """Raises AdapterError when there is none of that name."""
        for file in self.files:
            if file.path == path:
                return file
        raise AdapterError(f"Adapter {self.adapter_id} has no {path}.")

    @property
    def weights(self) -> ManifestFile:
        return self.file(WEIGHTS_FILE)

    @classmethod
    def from_bytes(cls, data: bytes) -> CheckpointManifest:
        """Raises AdapterError when the bytes are not a manifest of ours."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise AdapterError(f"Not a checkpoint manifest: {error.errors(include_url=False)[0]['msg']}") from error


class Artifact(WireModel):
    """One file of an adapter as events and checkpoint lists show it."""

    pathname: str
    kind: str
    size_bytes: int
    url: str


class Checkpoint(WireModel):
    """A committed checkpoint as the API lists it."""

    job_id: str
    step: int
    kind: Literal["checkpoint", "final"]
    adapter_id: str
    manifest_sha256: str
    ready: bool
    created_at: Timestamp
    metrics: dict[str, float | None] = {}
    artifacts: list[Artifact] = []
