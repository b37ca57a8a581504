"""Where a client finds its service, its token and its project: the TypeScript SDK's own files.

`~/.arkor/credentials.json` holds one service's URL and token, `.arkor/state.json` in the project's directory its
organisation and project. Files made for another service are left alone and never sent to this one; ours are then kept
beside them, under a name made from this service's URL.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from arkor_ray.client.whole_file import whole_file
from arkor_ray.errors import InvalidRequestError

logger = logging.getLogger(__name__)

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "ARKOR_CLOUD_API_URL"


@dataclass(frozen=True)
class Credentials:
    """A token and what is known about its owner. `path` is the file it came from, None for a token given by hand."""

    token: str
    org_slug: str | None = None
    path: Path | None = None
    #: Another service's files occupy the usual names, so this service's are kept beside them.
    beside: bool = False


@dataclass(frozen=True)
class ProjectState:
    org_slug: str
    project_slug: str
    path: Path


def normalise_url(url: str) -> str:
    """One spelling per service: lower-case scheme and host, no default port, no trailing slash.

    Raises InvalidRequestError for anything but http:// and https://.
    """
    parts = urlsplit(url.strip())
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidRequestError(f"{url!r} is not a URL: {error}", param="apiUrl") from error
    if parts.scheme not in ("http", "https") or not host:
        raise InvalidRequestError(f"{url!r} must be an http:// or https:// URL such as {DEFAULT_URL}", param="apiUrl")
    host = f"[{host}]" if ":" in host else host
    shown_port = "" if port in (None, {"http": 80, "https": 443}[parts.scheme]) else f":{port}"
    return f"{parts.scheme}://{host}{shown_port}{parts.path.rstrip('/')}"


def project_slug(name: str) -> str:
    """The slug the TypeScript SDK gives to a project in a directory of this name."""
    return re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-")[:40] or "project"


class CredentialStore:
    """The credentials files of one user. `home` is `~/.arkor`."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home if home is not None else Path.home() / ".arkor"

    @property
    def primary(self) -> Path:
        return self.home / "credentials.json"

    def base_url(self, url: str | None = None) -> str:
        """The service to talk to: `url`, else the variable, else the stored credentials' own, else this machine."""
        stored = (_read_object(self.primary) or {}).get("arkorCloudApiUrl")
        return normalise_url(url or os.environ.get(URL_VARIABLE) or _text(stored) or DEFAULT_URL)

    def load(self, base_url: str) -> Credentials | None:
        """The stored credentials of the service at `base_url`, None if there are none."""
        for path in (self.primary, self._beside(base_url)):
            stored = _read_object(path)
            if stored is None or not _is_for(stored, base_url):
                continue
            token = _text(stored.get("accessToken" if stored.get("mode") == "oauth" else "token"))
            if token:
                return Credentials(token, _text(stored.get("orgSlug")), path, path != self.primary)
        return None

    def save(self, base_url: str, token: str, *, org_slug: str, anonymous_id: str) -> Credentials:
        """Store a token in the anonymous form, readable by this user alone.

        Another that was stored for this URL is kept in a file beside it, and that is logged: nothing tells one service at a
        URL from the next, and an anonymous user's token is the only way back to what is theirs.
        """
        stored = _read_object(self.primary)
        beside = self.primary.exists() and (stored is None or not _is_for(stored, base_url))
        path = self._beside(base_url) if beside else self.primary
        form = {
            "mode": "anon",
            "token": token,
            "anonymousId": anonymous_id,
            "arkorCloudApiUrl": base_url,
            "orgSlug": org_slug,
        }
        last = self.load(base_url)
        if last is not None and last.path == path and last.token != token:
            kept = path.with_name(f"{path.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
            with whole_file(kept, 0o600) as file:
                file.write(path.read_bytes())
            logger.warning("The token that was stored for %s is kept in %s", base_url, kept)
        _write_object(path, form, mode=0o600)
        return Credentials(token, org_slug, path, beside)

    def _beside(self, base_url: str) -> Path:
        return self.home / f"credentials-{url_key(base_url)}.json"


class StateStore:
    """The project file of one working directory."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = (directory or Path.cwd()).absolute()

    def path(self, base_url: str, *, beside: bool) -> Path:
        return self.directory / ".arkor" / (f"state-{url_key(base_url)}.json" if beside else "state.json")

    def load(self, base_url: str, *, beside: bool) -> ProjectState | None:
        path = self.path(base_url, beside=beside)
        stored = _read_object(path) or {}
        org, project = _text(stored.get("orgSlug")), _text(stored.get("projectSlug"))
        return ProjectState(org, project, path) if org and project else None

    def save(self, base_url: str, *, beside: bool, org_slug: str, project_slug: str, project_id: str) -> None:
        form = {"orgSlug": org_slug, "projectSlug": project_slug, "projectId": project_id}
        _write_object(self.path(base_url, beside=beside), form, mode=0o644)


def url_key(base_url: str) -> str:
    """A file name's part for a service: `http://127.0.0.1:8000` is `127.0.0.1-8000`."""
    scheme, _, rest = base_url.partition("://")
    return re.sub(r"[^A-Za-z0-9.]+", "-", rest if scheme == "http" else f"{scheme}-{rest}").strip("-")


def _is_for(stored: dict[str, Any], base_url: str) -> bool:
    url = _text(stored.get("arkorCloudApiUrl"))
    try:
        return url is not None and normalise_url(url) == base_url
    except InvalidRequestError:
        return False


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None when there is no file, or none that holds one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write_object(path: Path, value: dict[str, Any], *, mode: int) -> None:
    """Atomic, and never readable by others for a moment: another process may read or write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if mode == 0o600 else 0o755)
    with whole_file(path, mode) as file:
        file.write(f"{json.dumps(value, indent=2)}\n".encode())
