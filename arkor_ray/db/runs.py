"""Stored runs: written in batches, read by endpoint, and swept once they are older than their endpoint keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, delete, insert, or_, select
from sqlalchemy.orm import Session

from arkor_ray.db.session import Database
from arkor_ray.db.tables import ID, EndpointRow, RunRow, new_id
from arkor_ray.errors import NotFoundError
from arkor_ray.schemas.base import utcnow

PAGE = 200


@dataclass(frozen=True)
class NewRun:
    """A run to be stored; the columns of `RunRow`. Its id is made here, so that storing it twice is impossible."""

    endpoint_id: str
    key_id: str | None
    model: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    answer: dict[str, Any]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    latency_ms: int
    first_token_ms: int | None
    system_fingerprint: str | None
    created_at: datetime = field(default_factory=utcnow)
    id: str = field(default_factory=new_id)


def add_all(session: Session, runs: Sequence[NewRun]) -> None:
    """Raises IntegrityError if the endpoint of one was deleted, or one is stored already."""
    session.execute(insert(RunRow), [vars(run) for run in runs])


def list_runs(session: Session, endpoint_id: str, *, limit: int, before: str | None = None) -> Sequence[RunRow]:
    """The newest runs of an endpoint, newest first; with `before`, those older than the run of that id.

    Raises NotFoundError if the endpoint has no run `before`.
    """
    query = select(RunRow).where(RunRow.endpoint_id == endpoint_id)
    if before is not None:
        last = session.get(RunRow, before) if ID.fullmatch(before) else None
        if last is None or last.endpoint_id != endpoint_id:
            raise NotFoundError(
                f"before: no run {before[:64]!r} of this endpoint; it may have been swept, so list anew", param="before"
            )
        same_moment = and_(RunRow.created_at == last.created_at, RunRow.id < last.id)
        query = query.where(or_(RunRow.created_at < last.created_at, same_moment))
    return session.scalars(query.order_by(RunRow.created_at.desc(), RunRow.id.desc()).limit(limit)).all()


def every_run(db: Database, endpoint_id: str) -> Iterator[RunRow]:
    """All runs of an endpoint, oldest first, however many: read in pages, each in a transaction of its own."""
    query = select(RunRow).where(RunRow.endpoint_id == endpoint_id).order_by(RunRow.created_at, RunRow.id).limit(PAGE)
    page_query = query
    while True:
        with db.read() as session:
            page = session.scalars(page_query).all()
        yield from page
        if len(page) < PAGE:
            return
        last = page[-1]
        same_moment = and_(RunRow.created_at == last.created_at, RunRow.id > last.id)
        page_query = query.where(or_(RunRow.created_at > last.created_at, same_moment))


def sweep(session: Session, now: datetime, limit: int) -> int:
    """Deletes runs that are older than their endpoint keeps them as it is set now, at most `limit`; how many it were.

    An endpoint that stores no more runs keeps those it has: turning that off and on again loses nothing.
    """
    by_days = (EndpointRow.run_retention_mode == "days", EndpointRow.run_retention_days.is_not(None))
    swept = 0
    for days in session.scalars(select(EndpointRow.run_retention_days).where(*by_days).distinct()).all():
        kept_by = select(EndpointRow.id).where(*by_days, EndpointRow.run_retention_days == days)
        too_old = RunRow.created_at < now - timedelta(days=days or 0)
        old = select(RunRow.id).where(RunRow.endpoint_id.in_(kept_by), too_old)
        ids = session.scalars(old.limit(limit - swept)).all()
        session.execute(delete(RunRow).where(RunRow.id.in_(ids)).execution_options(synchronize_session=False))
        swept += len(ids)
    return swept
