"""Callers and what they belong to: identities, organisations, memberships, bearer tokens.

Every identity is a member of one organisation: an anonymous one of its personal organisation, one with an issued token
of the organisation it was issued for. So whoever may list or revoke the tokens of an organisation reaches no other one.
Only the SHA-256 of a token is stored.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from arkor_ray.db.tables import IdentityRow, MemberRow, OrgRow, TokenRow
from arkor_ray.errors import (
    AuthenticationError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
)
from arkor_ray.schemas.base import utcnow

ANONYMOUS = "anonymous"
OPERATOR = "operator"

TOKEN_PREFIX = "arkt_"
TOKEN_BYTES = 32
SHOWN_CHARACTERS = 12  # of a token, so that its owner recognises it in a list
ORG_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


@dataclass(frozen=True)
class Caller:
    """Who stands behind a valid token. `token_expires_at` is None for a token without an end."""

    identity_id: str
    kind: str
    email: str | None
    token_id: str
    token_expires_at: datetime | None
    token_last_used_at: datetime | None


@dataclass(frozen=True)
class Issued:
    """A new token: the only moment at which `plaintext` exists."""

    plaintext: str
    token: TokenRow
    identity: IdentityRow
    org: OrgRow


def create_anonymous(session: Session, *, days: int) -> Issued:
    """A new identity with a personal organisation and a token for `days`."""
    return _issue(session, _personal_org(session), kind=ANONYMOUS, label="", email=None, days=days)


def issue_token(
    session: Session,
    org: OrgRow,
    *,
    label: str,
    email: str | None = None,
    days: int | None = None,
    not_after: datetime | None = None,
) -> Issued:
    """A token of its own identity for one more user of `org`; without `days` and `not_after` it has no end."""
    return _issue(session, org, kind=OPERATOR, label=label, email=email, days=days, not_after=not_after)


def ensure_org(session: Session, slug: str, name: str | None = None) -> OrgRow:
    """The organisation of that slug, made if there is none: the operator's way to one that is nobody's personal one."""
    if not ORG_SLUG.fullmatch(slug):
        raise InvalidRequestError(
            f"orgSlug: must be 1 to 64 of a-z, 0-9 and '-', not starting with '-' (got {slug!r})", param="orgSlug"
        )
    return _org(session, slug) or _add_org(session, slug, name or slug) or _existing_org(session, slug)


def authenticate(session: Session, plaintext: str) -> Caller:
    """Raises AuthenticationError for a token that is unknown, expired or revoked."""
    row = session.execute(
        select(TokenRow, IdentityRow)
        .join(IdentityRow, IdentityRow.id == TokenRow.identity_id)
        .where(TokenRow.sha256 == digest(plaintext))
    ).one_or_none()
    if row is None:
        raise AuthenticationError(
            "The token is not one of this server. Run `arkor-ray login`, or ask the operator for one"
        )
    token, identity = row
    if token.revoked_at is not None:
        raise AuthenticationError("The token was revoked. Run `arkor-ray login`, or ask the operator for a new one")
    if token.expires_at is not None and token.expires_at <= utcnow():
        raise AuthenticationError("The token has expired. Run `arkor-ray login`, or ask the operator for a new one")
    return Caller(identity.id, identity.kind, identity.email, token.id, token.expires_at, token.last_used_at)


def touch_token(session: Session, token_id: str) -> None:
    session.execute(update(TokenRow).where(TokenRow.id == token_id).values(last_used_at=utcnow()))


def orgs_of(session: Session, identity_id: str) -> Sequence[OrgRow]:
    """Organisations the identity is a member of, oldest first."""
    query = select(OrgRow).join(MemberRow, MemberRow.org_id == OrgRow.id).where(MemberRow.identity_id == identity_id)
    return session.scalars(query.order_by(OrgRow.created_at, OrgRow.id)).all()


def member_org(session: Session, identity_id: str, slug: str) -> OrgRow:
    """Raises PermissionDeniedError if the identity is no member of it, also if there is no such organisation."""
    org = None
    if ORG_SLUG.fullmatch(slug):
        member = select(MemberRow.org_id).where(MemberRow.identity_id == identity_id)
        org = session.scalar(select(OrgRow).where(OrgRow.slug == slug, OrgRow.id.in_(member)))
    if org is None:
        raise PermissionDeniedError(
            f"Your token does not belong to the organisation {slug!r}. "
            "If .arkor/state.json was made with another login, delete it and try again"
        )
    return org


def list_tokens(session: Session, org_id: str) -> Sequence[TokenRow]:
    """Every token of the organisation's members, newest first, revoked and expired ones included."""
    newest_first = (TokenRow.created_at.desc(), TokenRow.id)
    return session.scalars(select(TokenRow).where(_owned_by(org_id)).order_by(*newest_first)).all()


def revoke_token(session: Session, org_id: str, token_id: str) -> None:
    """From now on the token is refused. Raises NotFoundError if the organisation has no such token."""
    token = session.scalar(select(TokenRow).where(_owned_by(org_id), TokenRow.id == token_id))
    if token is None:
        raise NotFoundError(f"No token {token_id} in this organisation")
    if token.revoked_at is None:
        token.revoked_at = utcnow()


def digest(plaintext: str) -> str:
    """What is kept of a secret that was made here. It is random, so its hash needs neither salt nor stretching."""
    return hashlib.sha256(plaintext.encode("utf-8", "surrogatepass")).hexdigest()


def _owned_by(org_id: str) -> ColumnElement[bool]:
    return TokenRow.identity_id.in_(select(MemberRow.identity_id).where(MemberRow.org_id == org_id))


def _issue(
    session: Session,
    org: OrgRow,
    *,
    kind: str,
    label: str,
    email: str | None,
    days: int | None,
    not_after: datetime | None = None,
) -> Issued:
    identity = IdentityRow(kind=kind, email=email)
    session.add(identity)
    session.flush()
    plaintext = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    ends = [end for end in (utcnow() + timedelta(days=days) if days else None, not_after) if end is not None]
    token = TokenRow(
        identity_id=identity.id,
        sha256=digest(plaintext),
        prefix=plaintext[:SHOWN_CHARACTERS],
        label=label,
        expires_at=min(ends, default=None),
    )
    session.add_all([MemberRow(org_id=org.id, identity_id=identity.id), token])
    session.flush()
    return Issued(plaintext, token, identity, org)


def _personal_org(session: Session) -> OrgRow:
    # Six digits read well and are rarely taken; each further try has more of them, so this always ends soon.
    for tried in range(8):
        slug = f"anon-{secrets.token_hex(3 + tried)}"
        org = None if _org(session, slug) else _add_org(session, slug, "Anonymous")
        if org is not None:
            return org
    raise ConflictError("No free slug for a personal organisation")


def _org(session: Session, slug: str) -> OrgRow | None:
    return session.scalar(select(OrgRow).where(OrgRow.slug == slug))


def _existing_org(session: Session, slug: str) -> OrgRow:
    return session.scalars(select(OrgRow).where(OrgRow.slug == slug)).one()


def _add_org(session: Session, slug: str, name: str) -> OrgRow | None:
    """None if another transaction took the slug in the meantime."""
    org = OrgRow(slug=slug, name=name)
    try:
        with session.begin_nested():
            session.add(org)
    except IntegrityError:
        return None
    return org
