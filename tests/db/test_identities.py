"""Callers: what a token opens, and when it stops opening it."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import select, text

from arkor_ray.db import identities
from arkor_ray.db.session import Database
from arkor_ray.db.tables import TokenRow
from arkor_ray.errors import AuthenticationError, InvalidRequestError, NotFoundError, PermissionDeniedError
from arkor_ray.schemas.base import utcnow


def test_anonymous_identity_belongs_to_its_own_org_only(db: Database) -> None:
    with db.write() as session:
        first = identities.create_anonymous(session, days=90)
        second = identities.create_anonymous(session, days=90)
    with db.read() as session:
        caller = identities.authenticate(session, first.plaintext)
        assert caller.kind == "anonymous"
        assert [org.slug for org in identities.orgs_of(session, caller.identity_id)] == [first.org.slug]
        assert identities.member_org(session, caller.identity_id, first.org.slug).id == first.org.id
        with pytest.raises(PermissionDeniedError):
            identities.member_org(session, caller.identity_id, second.org.slug)


def test_unknown_org_is_refused_like_a_foreign_one(db: Database) -> None:
    with db.write() as session:
        mine = identities.create_anonymous(session, days=90)
        for slug in ("nowhere", "", "\x00", "a" * 500):
            with pytest.raises(PermissionDeniedError):
                identities.member_org(session, mine.identity.id, slug)


def test_slug_of_a_personal_org_has_six_digits(db: Database) -> None:
    with db.write() as session:
        slug = identities.create_anonymous(session, days=90).org.slug
    assert slug.startswith("anon-") and len(slug) == 11


def test_taken_slug_of_a_personal_org_is_not_given_twice(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities.secrets, "token_hex", lambda size: "a" * 2 * size)
    with db.write() as session:
        slugs = [identities.create_anonymous(session, days=90).org.slug for _ in range(3)]
    assert len(set(slugs)) == 3


def test_database_holds_no_token(db: Database) -> None:
    with db.write() as session:
        issued = identities.create_anonymous(session, days=90)
        stored = [str(value) for row in session.execute(text("SELECT * FROM tokens")) for value in row]
    assert len(issued.plaintext) >= 43 + len(identities.TOKEN_PREFIX)
    assert not any(issued.plaintext in value for value in stored)
    assert issued.token.prefix == issued.plaintext[:12]


@pytest.mark.parametrize("wrong", ["", "arkt_wrong", "\x00", "\ud800", "x" * 10_000])
def test_wrong_token_is_refused(db: Database, wrong: str) -> None:
    with db.read() as session, pytest.raises(AuthenticationError):
        identities.authenticate(session, wrong)


def test_expired_token_is_refused(db: Database) -> None:
    with db.write() as session:
        issued = identities.create_anonymous(session, days=1)
        identities.authenticate(session, issued.plaintext)
        issued.token.expires_at = utcnow() - timedelta(seconds=1)
        session.flush()
        with pytest.raises(AuthenticationError, match="expired"):
            identities.authenticate(session, issued.plaintext)


def test_revoked_token_is_refused_and_stays_listed(db: Database) -> None:
    with db.write() as session:
        issued = identities.create_anonymous(session, days=90)
        identities.revoke_token(session, issued.org.id, issued.token.id)
        with pytest.raises(AuthenticationError, match="revoked"):
            identities.authenticate(session, issued.plaintext)
        [listed] = identities.list_tokens(session, issued.org.id)
        first_revoked = listed.revoked_at
        identities.revoke_token(session, issued.org.id, issued.token.id)
        assert listed.revoked_at == first_revoked is not None


def test_token_of_another_org_can_be_neither_seen_nor_revoked(db: Database) -> None:
    with db.write() as session:
        mine = identities.create_anonymous(session, days=90)
        theirs = identities.create_anonymous(session, days=90)
        with pytest.raises(NotFoundError):
            identities.revoke_token(session, mine.org.id, theirs.token.id)
        assert [token.id for token in identities.list_tokens(session, mine.org.id)] == [mine.token.id]
        identities.authenticate(session, theirs.plaintext)


def test_issued_token_is_an_identity_of_its_own_in_that_org(db: Database) -> None:
    with db.write() as session:
        org = identities.ensure_org(session, "research", "Research")
        issued = identities.issue_token(session, org, label="ci", email="ci@example.com")
        caller = identities.authenticate(session, issued.plaintext)
        assert (caller.kind, caller.email, caller.token_expires_at) == ("operator", "ci@example.com", None)
        assert identities.member_org(session, caller.identity_id, "research").id == org.id
        assert identities.ensure_org(session, "research").id == org.id


def test_issued_token_ends_at_the_earlier_of_its_two_limits(db: Database) -> None:
    tomorrow = utcnow() + timedelta(days=1)
    with db.write() as session:
        org = identities.ensure_org(session, "research")
        for days, expected in ((None, tomorrow), (30, tomorrow)):
            issued = identities.issue_token(session, org, label="", days=days, not_after=tomorrow)
            assert issued.token.expires_at == expected
        free = identities.issue_token(session, org, label="", days=30)
        assert free.token.expires_at is not None and free.token.expires_at > tomorrow


def test_org_slug_must_be_a_slug(db: Database) -> None:
    with db.write() as session, pytest.raises(InvalidRequestError, match="orgSlug"):
        identities.ensure_org(session, "Not a slug")


def test_org_that_two_processes_make_at_once_is_made_once(db: Database) -> None:
    def ensure(_: int) -> str:
        with db.write() as session:
            return identities.ensure_org(session, "research").id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ensure, range(16)))) == 1


def test_last_use_is_recorded(db: Database) -> None:
    with db.write() as session:
        issued = identities.create_anonymous(session, days=90)
        assert identities.authenticate(session, issued.plaintext).token_last_used_at is None
        identities.touch_token(session, issued.token.id)
    with db.read() as session:
        assert session.scalars(select(TokenRow)).one().last_used_at is not None


def test_caller_cannot_be_changed(db: Database) -> None:
    with db.write() as session:
        caller = identities.authenticate(session, identities.create_anonymous(session, days=90).plaintext)
    with pytest.raises(dataclasses.FrozenInstanceError):
        caller.identity_id = "another"  # type: ignore[misc]
