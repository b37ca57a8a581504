"""`arkor-ray tokens`."""

from __future__ import annotations

from typing import Annotated

import typer

from arkor_ray.cli.connection import ApiUrl, AsJson, connect
from arkor_ray.cli.output import age, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Create, list and revoke access tokens of your organisation.")


@app.command()
def create(
    label: Annotated[str, typer.Argument(help="What the token is for, such as a person or a machine.")],
    email: Annotated[str | None, typer.Option(help="Whose it is.", show_default=False)] = None,
    days: Annotated[
        int | None, typer.Option(min=1, help="Its life. Default: that of your own token.", show_default=False)
    ] = None,
    api_url: ApiUrl = None,
    as_json: AsJson = False,
) -> None:
    """Issue a token. It is shown this once; `arkor-ray login --token` stores it where it is to be used."""
    with connect(api_url) as client:
        issued = client.create_token(label, email=email, expires_in_days=days)
    if as_json:
        print_json(issued)
        return
    typer.echo(f"Token {issued.id} ({issued.label}) of {issued.org.slug}, shown only now:", err=True)
    print(issued.token)


@app.command("list")
def list_tokens(api_url: ApiUrl = None, as_json: AsJson = False) -> None:
    """List the organisation's tokens, without their secrets."""
    with connect(api_url) as client:
        tokens = client.list_tokens()
    if as_json:
        print_json(tokens)
        return
    rows = [
        (
            each.id,
            each.label,
            f"{each.prefix}…",
            "revoked" if each.revoked_at else "valid",
            age(each.created_at),
            age(each.last_used_at) or "never",
        )
        for each in tokens
    ]
    print_table(("TOKEN", "LABEL", "PREFIX", "STATE", "CREATED", "USED"), rows, empty="There are no tokens.")


@app.command()
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="TOKEN", help="The token's id, as listed.")], api_url: ApiUrl = None
) -> None:
    """Make a token invalid at once."""
    with connect(api_url) as client:
        client.revoke_token(token_id)
    print(f"Revoked token {token_id}")
