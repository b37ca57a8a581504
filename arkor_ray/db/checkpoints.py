"""Checkpoints as the API lists them. The manifest in storage is the truth; rows follow it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from arkor_ray.db.tables import CheckpointRow
from arkor_ray.schemas.checkpoint import CheckpointManifest


def record(session: Session, manifest: CheckpointManifest) -> CheckpointRow:
    """Stores a committed manifest once; a second call for the same adapter changes nothing."""
    row = session.get(CheckpointRow, manifest.adapter_id)
    if row is None:
        row = CheckpointRow(
            adapter_id=manifest.adapter_id,
            job_id=manifest.job_id,
            step=manifest.step,
            final=manifest.final,
            manifest_sha256=manifest.sha256,
            base_model=manifest.base_model,
            base_precision=manifest.base_precision,
            manifest=manifest.model_dump(mode="json"),
            created_at=manifest.created_at,
        )
        session.add(row)
        session.flush()
    return row


def list_for_job(session: Session, job_id: str) -> Sequence[CheckpointRow]:
    """Checkpoints by step, the final adapter last."""
    by_step = (CheckpointRow.step, CheckpointRow.final)
    return session.scalars(select(CheckpointRow).where(CheckpointRow.job_id == job_id).order_by(*by_step)).all()


def find(session: Session, job_id: str, step: int | None) -> CheckpointRow | None:
    """The checkpoint of a step, or the final adapter for None."""
    which = (
        CheckpointRow.final.is_(True) if step is None else (CheckpointRow.step == step) & CheckpointRow.final.is_(False)
    )
    return session.scalar(select(CheckpointRow).where(CheckpointRow.job_id == job_id, which))
