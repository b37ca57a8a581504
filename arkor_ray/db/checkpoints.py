"""Checkpoints as the API lists them. The manifest in storage is the truth; rows follow it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Select, case, delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from arkor_ray.db.tables import CheckpointRow, EndpointRow, JobRow, MemberRow, OrgRow
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
        try:
            with session.begin_nested():
                session.add(row)
        except IntegrityError:  # told by two attempts, a lost one and its successor, at the same moment
            stored = session.get(CheckpointRow, manifest.adapter_id)
            if stored is None:
                raise
            row = stored
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


@dataclass(frozen=True)
class Progress:
    """How far a job has come: the step of its newest checkpoint, and whether that is its final adapter."""

    step: int
    final: bool


def progress(session: Session, job_ids: Collection[str]) -> dict[str, Progress]:
    """Of those of these jobs that have a checkpoint."""
    final = func.max(case((CheckpointRow.final, 1), else_=0))
    rows = session.execute(
        select(CheckpointRow.job_id, func.max(CheckpointRow.step), final)
        .where(CheckpointRow.job_id.in_(list(job_ids)))
        .group_by(CheckpointRow.job_id)
    )
    return {job_id: Progress(step, bool(ended)) for job_id, step, ended in rows}


def kept(session: Session, job_ids: Collection[str]) -> set[str]:
    """Of the adapters of these jobs, those that no age removes: each job's last one, and what an endpoint serves."""
    mine = CheckpointRow.job_id.in_(list(job_ids))
    rows = session.execute(
        select(CheckpointRow.adapter_id, CheckpointRow.job_id)
        .where(mine)
        .order_by(CheckpointRow.step, CheckpointRow.final)
    )
    last = {job_id: adapter_id for adapter_id, job_id in rows}
    served = session.scalars(select(EndpointRow.adapter_id).join(CheckpointRow).where(mine))
    return {*last.values(), *filter(None, served)}


def remove(session: Session, adapter_id: str) -> bool:
    """Makes an adapter unknown, before its files go. False, and it stays, if an endpoint serves it.

    An endpoint that turns to it at the same moment either finds no such adapter, or keeps it here.
    """
    try:
        with session.begin_nested():
            session.execute(delete(CheckpointRow).where(CheckpointRow.adapter_id == adapter_id))
    except IntegrityError:
        return False
    return True


def newest_of_member(session: Session, identity_id: str, limit: int) -> Sequence[tuple[CheckpointRow, str]]:
    """The newest adapters of all organisations of the identity, each with its organisation's slug."""
    member = select(MemberRow.org_id).where(MemberRow.identity_id == identity_id)
    newest_first = (CheckpointRow.created_at.desc(), CheckpointRow.adapter_id)
    query = _with_org().where(JobRow.org_id.in_(member)).order_by(*newest_first).limit(limit)
    return session.execute(query).tuples().all()


def with_org(session: Session, adapter_id: str) -> tuple[CheckpointRow, str]:
    """An adapter that exists, with its organisation's slug."""
    return session.execute(_with_org().where(CheckpointRow.adapter_id == adapter_id)).tuples().one()


def _with_org() -> Select[CheckpointRow, str]:
    query = select(CheckpointRow, OrgRow.slug).join(JobRow, JobRow.id == CheckpointRow.job_id)
    return query.join(OrgRow, OrgRow.id == JobRow.org_id)
