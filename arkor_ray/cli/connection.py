"""Options that every command shares, and the client they make."""

from __future__ import annotations

from typing import Annotated

import typer

from arkor_ray.client.client import Client
from arkor_ray.client.credentials import URL_VARIABLE

ApiUrl = Annotated[
    str | None,
    typer.Option(
        "--api-url",
        envvar=URL_VARIABLE,
        help="The service. Default: that of the stored credentials.",
        show_default=False,
    ),
]
ProjectSlug = Annotated[
    str | None,
    typer.Option("--project", help="Slug of the project. Default: that of .arkor/state.json here.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for scripts.")]


def connect(api_url: str | None, project: str | None = None, *, token: str | None = None) -> Client:
    return Client(api_url, project=project, token=token)
