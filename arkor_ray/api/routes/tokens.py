"""Tokens for further users of an organisation, such as a teammate or a CI run."""

from __future__ import annotations

from fastapi import APIRouter

from arkor_ray.api.bodies import TokenCreate, TokenList
from arkor_ray.api.deps import CallerDep, OrgDep, ServicesDep
from arkor_ray.api.request_body import StrictJsonRoute
from arkor_ray.db import identities
from arkor_ray.schemas.identity import IssuedToken, Org, Token, User

router = APIRouter(prefix="/v1/tokens", tags=["tokens"], route_class=StrictJsonRoute)


@router.get("", summary="List the organisation's tokens, without their secrets")
def list_tokens(services: ServicesDep, org: OrgDep) -> TokenList:
    with services.db.read() as session:
        rows = identities.list_tokens(session, org.id)
    return TokenList(
        tokens=[
            Token(
                id=row.id,
                label=row.label,
                prefix=row.prefix,
                created_at=row.created_at,
                expires_at=row.expires_at,
                last_used_at=row.last_used_at,
                revoked_at=row.revoked_at,
            )
            for row in rows
        ]
    )


@router.post("", status_code=201, summary="Issue a token; its plaintext is in this answer and nowhere else")
def create_token(services: ServicesDep, caller: CallerDep, org: OrgDep, body: TokenCreate) -> IssuedToken:
    with services.db.write() as session:
        # Never longer than the caller's own: else an anonymous caller could make itself a token for ever.
        issued = identities.issue_token(
            session,
            org,
            label=body.label,
            email=body.email,
            days=body.expires_in_days,
            not_after=caller.token_expires_at,
        )
    return IssuedToken(
        token=issued.plaintext,
        id=issued.token.id,
        label=issued.token.label,
        org=Org(id=org.id, slug=org.slug, name=org.name),
        user=User(id=issued.identity.id, email=issued.identity.email, kind=issued.identity.kind),
        expires_at=issued.token.expires_at,
    )


@router.delete("/{token_id}", status_code=204, summary="Revoke a token; it stays listed")
def revoke_token(services: ServicesDep, org: OrgDep, token_id: str) -> None:
    with services.db.write() as session:
        identities.revoke_token(session, org.id, token_id)
