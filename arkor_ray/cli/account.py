"""`arkor-ray login` and `arkor-ray whoami`."""

from __future__ import annotations

from typing import Annotated

import typer

from arkor_ray.cli.connection import ApiUrl, AsJson, connect
from arkor_ray.cli.output import print_json
from arkor_ray.errors import PermissionDeniedError


def login(
    token: Annotated[
        str | None, typer.Option(help="A token that the operator issued; '-' asks for it.", show_default=False)
    ] = None,
    org: Annotated[
        str | None, typer.Option(help="Which organisation, if there are several.", show_default=False)
    ] = None,
    api_url: ApiUrl = None,
) -> None:
    """Store a token for a service: the one given, else that of a new anonymous user."""
    if token == "-":
        token = typer.prompt("Token", hide_input=True)
    with connect(api_url, token=token) as client:
        if token is None:
            client.sign_in()
            print(f"Logged in to {client.base_url} as a new anonymous user")
            return
        me = client.me()
        slugs = [each.slug for each in me.orgs]
        if not slugs or (org is not None and org not in slugs):
            raise PermissionDeniedError(f"This token's owner is a member of {', '.join(slugs) or 'no organisation'}")
        saved = client.session.credential_store.save(
            client.base_url, token, org_slug=org or slugs[0], anonymous_id=me.user.id
        )
        print(f"Logged in to {client.base_url} as a member of {saved.org_slug}")


def whoami(api_url: ApiUrl = None, as_json: AsJson = False) -> None:
    """Show the service, the user and the organisations."""
    with connect(api_url) as client:
        me = client.me()
        if as_json:
            print_json({"apiUrl": client.base_url, "user": me.user, "orgs": me.orgs})
            return
        print(f"{client.base_url}: {me.user.email or me.user.id} ({me.user.kind})")
        for org in me.orgs:
            print(f"  {org.slug}  {org.name}")
