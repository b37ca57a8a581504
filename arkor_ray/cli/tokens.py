"""`arkor-ray tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arkor_ray.cli.connection import ApiUrl, AsJson, connect
from arkor_ray.cli.output import SECRET_COLUMNS, print_json, print_table, secret_row

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


@app.command()
def issue(
    label: Annotated[str, typer.Argument(help="What the token is for, such as a person or a machine.")],
    org: Annotated[str, typer.Option(help="Slug of the organisation; made if there is none.")],
    days: Annotated[int | None, typer.Option(min=1, help="Its life. Default: no end.", show_default=False)] = None,
    data_dir: Annotated[Path, typer.Option(help="Of the service on this machine.", envvar="ARKOR_RAY_DATA_DIR")] = Path(
        ".arkor-ray"
    ),
    as_json: AsJson = False,
) -> None:
    """For the operator: issue a token from the service's machine, which nobody needs a token for.

    Writes to the database of --data-dir, or of ARKOR_RAY_DATABASE_URL. With ARKOR_RAY_ANONYMOUS=0 it makes the first one.
    """
    from arkor_ray.db import identities
    from arkor_ray.db.session import Database
    from arkor_ray.embedded import make_data_dir
    from arkor_ray.placeholders import shown_database_url
    from arkor_ray.service import check_database
    from arkor_ray.settings import Settings

    settings = Settings.load(data_dir=data_dir)
    database = settings.database_file
    is_new = database is not None and not database.exists()
    if database is not None and database.parent == settings.data_dir:
        make_data_dir(settings.data_dir)
    check_database(settings)
    db = Database(settings.database_url)
    db.migrate()
    with db.write() as session:
        issued = identities.issue_token(session, identities.ensure_org(session, org), label=label, days=days)
    typer.echo(f"Database: {shown_database_url(settings.database_url)}", err=True)
    if is_new:
        typer.echo(
            "warning: there was none, so it has just been made: only a service that is started on it knows this token. For "
            "one that runs already, give its --data-dir or ARKOR_RAY_DATABASE_URL",
            err=True,
        )
    if as_json:
        print_json({"token": issued.plaintext, "org": org, "label": label})
        return
    typer.echo(f"Token of {label} in {org}, shown only now; `arkor-ray login --token` stores it:", err=True)
    print(issued.plaintext)


@app.command("list")
def list_tokens(api_url: ApiUrl = None, as_json: AsJson = False) -> None:
    """List the organisation's tokens, without their secrets."""
    with connect(api_url) as client:
        tokens = client.list_tokens()
    if as_json:
        print_json(tokens)
        return
    rows = [secret_row(each, valid=each.revoked_at is None) for each in tokens]
    print_table(("TOKEN", *SECRET_COLUMNS), rows, empty="There are no tokens.")


@app.command()
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="TOKEN", help="The token's id, as listed.")], api_url: ApiUrl = None
) -> None:
    """Make a token invalid at once."""
    with connect(api_url) as client:
        client.revoke_token(token_id)
    print(f"Revoked token {token_id}")
