"""Endpoints and their keys: what is published, in which project, and who may call it.

Every change of an endpoint or of a key takes the next number of one counter, in the same transaction. So another process
sees with one small read that something changed, and by the rows' numbers what (`api/endpoint_directory.py`).
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from arkor_ray.db.identities import digest
from arkor_ray.db.tables import ID, CheckpointRow, CounterRow, EndpointKeyRow, EndpointRow
from arkor_ray.errors import ConflictError, NotFoundError
from arkor_ray.schemas.base import utcnow

KEY_PREFIX = "ark_live_"
KEY_BYTES = 32
SHOWN_CHARACTERS = len(KEY_PREFIX) + 8  # of a key, so that its owner recognises it in a list

_COUNTER = "endpoints"


@dataclass(frozen=True)
class IssuedKey:
    """A new key: the only moment at which `plaintext` exists."""

    plaintext: str
    row: EndpointKeyRow
    endpoint: EndpointRow


def create(
    session: Session,
    *,
    org_id: str,
    project_id: str,
    slug: str,
    target: dict[str, Any],
    adapter_id: str | None,
    auth_mode: str,
    retention: tuple[str, int | None],
) -> EndpointRow:
    """An enabled endpoint. Raises ConflictError if any project of the server has one of that slug."""
    number = _begin_change(session)
    refuse_taken(session, slug)
    mode, days = retention
    endpoint = EndpointRow(
        org_id=org_id,
        project_id=project_id,
        slug=slug,
        target=target,
        adapter_id=adapter_id,
        auth_mode=auth_mode,
        run_retention_mode=mode,
        run_retention_days=days,
        version=number,
    )
    session.add(endpoint)
    _flush(session)
    return endpoint


def refuse_taken(session: Session, slug: str) -> None:
    """Raises ConflictError if the slug is taken, by a disabled endpoint too."""
    if session.scalar(select(EndpointRow.id).where(EndpointRow.slug == slug)) is not None:
        raise ConflictError("Deployment slug is already taken", param="slug")


def get(session: Session, project_id: str, endpoint_id: str) -> EndpointRow:
    """The endpoint of this project. Raises NotFoundError, as everything here that takes an endpoint's id.

    One of another project is as unknown as one that never was.
    """
    endpoint = None
    if ID.fullmatch(endpoint_id):
        where = (EndpointRow.id == endpoint_id, EndpointRow.project_id == project_id)
        endpoint = session.scalar(select(EndpointRow).where(*where))
    if endpoint is None:
        raise NotFoundError(f"No endpoint {endpoint_id[:64]!r} in this project")
    return endpoint


def list_endpoints(session: Session, project_id: str) -> Sequence[EndpointRow]:
    """All endpoints of a project, newest first."""
    newest_first = (EndpointRow.created_at.desc(), EndpointRow.id)
    mine = select(EndpointRow).where(EndpointRow.project_id == project_id)
    return session.scalars(mine.order_by(*newest_first)).all()


def change(session: Session, project_id: str, endpoint_id: str, **values: Any) -> EndpointRow:
    """Sets columns of the endpoint. Raises NotFoundError also if the adapter to serve was deleted in the meantime."""
    number = _begin_change(session)
    endpoint = get(session, project_id, endpoint_id)
    for name, value in {**values, "version": number, "updated_at": utcnow()}.items():
        setattr(endpoint, name, value)
    _flush(session)
    return endpoint


def delete(session: Session, project_id: str, endpoint_id: str) -> EndpointRow:
    """With its keys. The slug is free afterwards."""
    _begin_change(session)
    endpoint = get(session, project_id, endpoint_id)
    session.delete(endpoint)
    return endpoint


def create_key(session: Session, project_id: str, endpoint_id: str, label: str) -> IssuedKey:
    number = _begin_change(session)
    endpoint = get(session, project_id, endpoint_id)
    endpoint.version = number
    plaintext = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    key = EndpointKeyRow(
        endpoint_id=endpoint.id, sha256=digest(plaintext), prefix=plaintext[:SHOWN_CHARACTERS], label=label
    )
    session.add(key)
    session.flush()
    return IssuedKey(plaintext, key, endpoint)


def list_keys(session: Session, project_id: str, endpoint_id: str) -> Sequence[EndpointKeyRow]:
    """Every key of the endpoint, newest first, revoked ones included."""
    endpoint = get(session, project_id, endpoint_id)
    newest_first = (EndpointKeyRow.created_at.desc(), EndpointKeyRow.id)
    own = select(EndpointKeyRow).where(EndpointKeyRow.endpoint_id == endpoint.id)
    return session.scalars(own.order_by(*newest_first)).all()


def revoke_key(session: Session, project_id: str, endpoint_id: str, key_id: str) -> EndpointRow:
    """From now on the key is refused; it stays listed. Raises NotFoundError also if the endpoint has no such key."""
    number = _begin_change(session)
    endpoint = get(session, project_id, endpoint_id)
    key = session.get(EndpointKeyRow, key_id) if ID.fullmatch(key_id) else None
    if key is None or key.endpoint_id != endpoint.id:
        raise NotFoundError(f"No key {key_id[:64]!r} of this endpoint")
    if key.revoked_at is None:
        key.revoked_at = utcnow()
        endpoint.version = number
    return endpoint


def touch_key(session: Session, key_id: str) -> None:
    session.execute(update(EndpointKeyRow).where(EndpointKeyRow.id == key_id).values(last_used_at=utcnow()))


@dataclass(frozen=True)
class Published:
    """An endpoint with all that calling it takes: its adapter's row, and the SHA-256 of each key that opens it."""

    endpoint: EndpointRow
    checkpoint: CheckpointRow | None
    keys: dict[str, str]  # SHA-256 to key id


def find_published(session: Session, slug: str) -> Published | None:
    """None for a slug without an endpoint, and for one that is disabled."""
    # The endpoint before its keys: were a change to fall in between, the number read here would be the older one.
    query = select(EndpointRow, CheckpointRow).outerjoin(CheckpointRow)
    found = session.execute(query.where(EndpointRow.slug == slug, EndpointRow.enabled.is_(True))).one_or_none()
    if found is None:
        return None
    endpoint, checkpoint = found
    valid = (EndpointKeyRow.endpoint_id == endpoint.id, EndpointKeyRow.revoked_at.is_(None))
    keys = session.execute(select(EndpointKeyRow.sha256, EndpointKeyRow.id).where(*valid))
    return Published(endpoint, checkpoint, dict(keys.tuples().all()))


def version(session: Session) -> int:
    """Grows with every change of any endpoint or key; a change is visible no later than its number."""
    return session.scalars(select(CounterRow.value).where(CounterRow.name == _COUNTER)).one()


def versions(session: Session, slugs: Collection[str]) -> dict[str, int]:
    """The number of each enabled endpoint's last change. A slug without one is left out."""
    query = select(EndpointRow.slug, EndpointRow.version)
    rows = session.execute(query.where(EndpointRow.slug.in_(list(slugs)), EndpointRow.enabled.is_(True)))
    return dict(rows.tuples().all())


def _begin_change(session: Session) -> int:
    """The number of the change that follows, to be asked for before anything is read.

    The counter's row stays locked until the transaction ends. So changes happen one after the other, each sees the one
    before, and their numbers become visible in their order.
    """
    raised = update(CounterRow).where(CounterRow.name == _COUNTER).values(value=CounterRow.value + 1)
    return session.scalars(raised.returning(CounterRow.value)).one()


def _flush(session: Session) -> None:
    try:
        session.flush()
    except IntegrityError as error:  # scope and slug were looked at under the lock, adapters are not covered by it
        raise NotFoundError(
            "The adapter was deleted in the meantime; choose another", param="target.adapter"
        ) from error
