"""A database and a storage with jobs in every state, told by the test; time passes when it says so."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from arkor_ray.db import checkpoints, endpoints
from arkor_ray.db.session import Database
from arkor_ray.db.tables import CounterRow, JobRow
from arkor_ray.events import publisher
from arkor_ray.schemas import event
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.checkpoint import CheckpointManifest, ManifestFile
from arkor_ray.schemas.job import JobStatus
from arkor_ray.storage import ObjectStore, layout
from tests.db.factories import create_job


class PassingStore:
    """A store whose clock can be put forward, which makes everything in it older. Notes what is asked for."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._passed = timedelta()
        self.deleted: list[str] = []

    def pass_time(self, **ago: float) -> None:
        self._passed += timedelta(**ago)

    def now(self) -> datetime:
        return self._store.now() + self._passed

    def delete(self, key: str) -> None:
        self.deleted.append(key)
        self._store.delete(key)

    def delete_all(self, keys: Any) -> None:
        for key in keys:
            self.delete(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@dataclass
class StoredJobs:
    db: Database
    store: PassingStore

    def create(self) -> str:
        job_id = create_job(self.db)
        self.store.put(layout.dataset_prefix(job_id) + "train.jsonl", b"{}")
        self.store.put(layout.dataset_prefix(job_id) + layout.DATASET_INDEX_NAME, b'["train"]')
        with self.db.write() as session:
            session.get(JobRow, job_id).attempt = 1
            publisher.start(session, job_id, {})
        return job_id

    def begin_checkpoint(self, job_id: str, step: int | None) -> str:
        """The files of a checkpoint without what commits it; returns the adapter's id."""
        adapter_id = layout.final_adapter_id(job_id) if step is None else layout.adapter_id(job_id, step)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            self.store.put(layout.adapter_prefix(adapter_id) + name, b"xy")
        if step is not None:
            for name in ("state.safetensors", layout.RESUME_INDEX_NAME):
                self.store.put(layout.resume_prefix(job_id, step) + name, b"xyz")
        return adapter_id

    def commit_checkpoint(self, job_id: str, step: int | None) -> str:
        adapter_id = self.begin_checkpoint(job_id, step)
        manifest = manifest_of(job_id, adapter_id, step)
        self.store.put(layout.manifest_key(adapter_id), manifest.to_bytes(), if_absent=True)
        with self.db.write() as session:
            checkpoints.record(session, manifest)
            if step is not None:
                publisher.append(session, job_id, event.CHECKPOINT, {"step": step}, key=f"checkpoint:{step}")
        return adapter_id

    def end(self, job_id: str, status: JobStatus = JobStatus.COMPLETED, *, stopped: bool = True) -> None:
        with self.db.write() as session:
            publisher.finish(session, job_id, status, type=f"training.{status.value}", fields={})
            session.get(JobRow, job_id).stopped_at = utcnow() if stopped else None

    def serve(self, job_id: str, adapter_id: str) -> str:
        """An endpoint of the adapter; returns its id."""
        with self.db.write() as session:
            if session.get(CounterRow, "endpoints") is None:
                session.add(CounterRow(name="endpoints", value=0))
                session.flush()
            job = session.get(JobRow, job_id)
            return endpoints.create(
                session, org_id=job.org_id, project_id=job.project_id, slug=adapter_id[-40:].strip("-"), target={},
                adapter_id=adapter_id, auth_mode="none", retention=("unlimited", None),
            ).id  # fmt: skip

    def stored(self, prefix: str = "") -> set[str]:
        return {info.key for info in self.store.list(prefix)}


def manifest_of(job_id: str, adapter_id: str, step: int | None) -> CheckpointManifest:
    return CheckpointManifest(
        adapter_id=adapter_id, job_id=job_id, step=step or 99, final=step is None, base_model="m", base_revision=None,
        base_precision="fp32", r=4, lora_alpha=8, target_modules=["q_proj"], template_sha256="0" * 64, metrics={},
        files=[ManifestFile(path="adapter_model.safetensors", size_bytes=2, sha256="0" * 64)],
        resume_prefix=None if step is None else layout.resume_prefix(job_id, step), probe=None, created_at=utcnow(),
    )  # fmt: skip
