"""Who calls: users, organisations, and the tokens that stand for them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from arkor_ray.schemas.base import Timestamp, WireModel


class Org(WireModel):
    id: str
    slug: str
    name: str


class User(WireModel):
    id: str
    email: str | None = None
    kind: str


class Me(WireModel):
    user: User
    orgs: list[Org]


class AnonymousRequest(WireModel):
    kind: Literal["cli", "web"] = "cli"


class AnonymousToken(WireModel):
    token: str
    anonymous_id: str
    kind: str
    personal_org: Org


class Token(WireModel):
    """A bearer token as listed: never its plaintext, which is returned once, on creation."""

    id: str
    label: str
    prefix: str
    created_at: Timestamp
    expires_at: Timestamp | None = None
    last_used_at: Timestamp | None = None
    revoked_at: Timestamp | None = None


class IssuedToken(WireModel):
    """A token just issued to an operator's user, with its plaintext."""

    token: str
    id: str
    label: str
    org: Org
    user: User
    expires_at: Timestamp | None = Field(default=None)
