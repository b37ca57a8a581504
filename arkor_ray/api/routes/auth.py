"""Getting in: anonymous tokens, the CLI's login configuration, and who one is."""

from __future__ import annotations

from fastapi import APIRouter

from arkor_ray.api.bodies import CliConfig
from arkor_ray.api.deps import CallerDep, ServicesDep
from arkor_ray.api.request_body import StrictJsonRoute
from arkor_ray.db import identities
from arkor_ray.errors import PermissionDeniedError
from arkor_ray.schemas.identity import AnonymousRequest, AnonymousToken, Me, Org, User

router = APIRouter(prefix="/v1", tags=["auth"], route_class=StrictJsonRoute)


@router.post("/auth/anonymous", summary="Make an anonymous identity with an organisation of its own")
def create_anonymous(services: ServicesDep, body: AnonymousRequest | None = None) -> AnonymousToken:
    if not services.settings.anonymous:
        raise PermissionDeniedError("This server gives out no anonymous tokens; ask its operator for a token")
    with services.db.write() as session:
        issued = identities.create_anonymous(session, days=services.settings.token_days)
    return AnonymousToken(
        token=issued.plaintext,
        anonymous_id=issued.identity.id,
        kind=(body or AnonymousRequest()).kind,
        personal_org=Org(id=issued.org.id, slug=issued.org.slug, name=issued.org.name),
    )


@router.get("/auth/cli/config", summary="How the arkor CLI logs in")
def cli_config() -> CliConfig:
    return CliConfig(auth0_domain=None, client_id=None, audience=None, callback_ports=[])


@router.get("/me", summary="Who calls, and the organisations it belongs to")
def me(services: ServicesDep, caller: CallerDep) -> Me:
    with services.db.read() as session:
        orgs = identities.orgs_of(session, caller.identity_id)
    return Me(
        user=User(id=caller.identity_id, email=caller.email, kind=caller.kind),
        orgs=[Org(id=org.id, slug=org.slug, name=org.name) for org in orgs],
    )
