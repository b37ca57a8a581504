"""Requests that a web page made, on a server that trusts whoever reaches it.

A browser sends requests to this machine for any page that is open in it. Where that is enough to be let in (anonymous
tokens) or where only this machine is meant to reach the API, a page of elsewhere shows itself by one of two headers: `Host`,
when the page's own name was made to lead here (DNS rebinding), and `Origin`, when it asks across origins. An address in
`Host` is nobody's trick: such a page would have a name.
"""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from arkor_ray.api.error_handlers import error_response
from arkor_ray.errors import PermissionDeniedError
from arkor_ray.schemas.address import ip_address, is_loopback
from arkor_ray.settings import Settings


class KnownHosts:
    """Answers 403 to hosts and origins that are not this server's own."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._checks = bool(settings.anonymous) or (settings.listens_on_loopback and not settings.cluster)
        machine = socket.gethostname()
        own = (
            settings.host,
            urlsplit(settings.api_url).hostname,
            settings.endpoints_domain,
            machine,
            machine.split(".")[0],
            *settings.host_names.split(","),
        )
        self._names = {name.strip().lower() for name in own if name and name.strip()}
        self._below = f".{settings.endpoints_domain}" if settings.endpoints_domain else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._checks and (refusal := self._refusal(scope)) is not None:
            return await error_response(PermissionDeniedError(refusal), scope, {"Connection": "close"})(
                scope, receive, send
            )
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (b"host", b"origin")}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        name = _hostname(f"//{host}")
        if host and not self._is_own(name) and ip_address(name) is None:
            return (
                f"This server is not known as {host[:100]!r}; the operator sets ARKOR_RAY_PUBLIC_URL to the URL by which "
                "it is reached, or lists the name in ARKOR_RAY_HOST_NAMES"
            )
        if origin is None:
            return None
        page = _hostname(origin)
        # It may be this server's own, also where that is known by an address.
        if not page or not (page == name or self._is_own(page)):
            return f"Pages of {origin[:100]!r} may not use this server; call it from a program or from your own server"
        return None

    def _is_own(self, name: str) -> bool:
        return name in self._names or is_loopback(name) or (self._below is not None and name.endswith(self._below))


def _hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
