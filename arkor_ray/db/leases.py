"""Leases: of all processes that ask, one holds a name at a time, and only while it keeps asking."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import delete, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from arkor_ray.db.tables import LeaseRow
from arkor_ray.schemas.base import utcnow


def hold(session: Session, name: str, holder: str, ttl_s: float) -> bool:
    """Takes or renews the lease for `ttl_s` seconds. False while somebody else holds it."""
    now = utcnow()
    expires_at = now + timedelta(seconds=ttl_s)
    free = or_(LeaseRow.holder == holder, LeaseRow.expires_at < now)
    taken = session.execute(
        update(LeaseRow).where(LeaseRow.name == name, free).values(holder=holder, expires_at=expires_at)
    )
    if taken.rowcount:  # type: ignore[attr-defined]
        return True
    if session.get(LeaseRow, name) is not None:
        return False
    try:
        with session.begin_nested():
            session.add(LeaseRow(name=name, holder=holder, expires_at=expires_at))
    except IntegrityError:  # another process inserted it at the same moment
        return False
    return True


def renewals(session: Session, names: Collection[str]) -> dict[str, datetime]:
    """Until when each of these leases was last renewed; one that was never taken is absent."""
    query = select(LeaseRow.name, LeaseRow.expires_at).where(LeaseRow.name.in_(names))
    return dict(session.execute(query).tuples().all())


def release(session: Session, name: str, holder: str) -> None:
    """Lets go at a clean stop, so that the next holder need not wait for the expiry."""
    session.execute(delete(LeaseRow).where(LeaseRow.name == name, LeaseRow.holder == holder))


def forget(session: Session, name: str) -> None:
    """Removes a lease that nobody will ask for again, whoever holds it."""
    session.execute(delete(LeaseRow).where(LeaseRow.name == name))
