"""Endpoints by host: `https://<slug>.<domain>/v1/…` is the same as `/e/<slug>/v1/…`."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from arkor_ray.schemas.endpoint import SLUG
from arkor_ray.settings import Settings


class EndpointHosts:
    """Puts every request to a host below the endpoints' domain under `/e/<slug>`.

    So on such a host nothing but its endpoint can be reached: no path leads out of that prefix, whatever it holds. The
    API's own host may lie below the same domain and stays what it is.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._below = f".{settings.endpoints_domain}" if settings.endpoints_domain else None
        self._own_host = urlsplit(settings.api_url).hostname

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._below is not None:
            host = _host(scope)
            if host.endswith(self._below) and host != self._own_host:
                slug = host.removesuffix(self._below)
                # What is no slug names no endpoint; left empty, the path has no route.
                scope = {**scope, "path": f"/e/{slug if SLUG.fullmatch(slug) else ''}{scope['path']}"}
        await self._app(scope, receive, send)


def _host(scope: Scope) -> str:
    """The name of the request's host, in lower case, without its port and the dot that may end it."""
    value = next((value for name, value in scope["headers"] if name == b"host"), b"")
    return value.decode("latin-1").partition(":")[0].lower().rstrip(".")
