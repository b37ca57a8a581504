"""The bearer token of a request."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from arkor_ray.errors import AuthenticationError

_scheme = HTTPBearer(auto_error=False, description="An anonymous token, or one issued by the operator.")


async def bearer_token(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_scheme)]) -> str:
    if credentials is None or not credentials.credentials:
        raise AuthenticationError("No token. Send `Authorization: Bearer <token>`; `arkor-ray login` gets one")
    return credentials.credentials
