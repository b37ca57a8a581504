"""One client's standing with one service: base URL, token, organisation and project, found on first use and kept.

No network I/O: `prepare` is a flow of calls that a sync or an async driver sends. The small files of `credentials.py`
are read and written here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx

from arkor_ray import __version__
from arkor_ray.client import calls
from arkor_ray.client.calls import Call, Flow, Scope, error_of
from arkor_ray.client.credentials import Credentials, CredentialStore, StateStore, project_slug
from arkor_ray.client.retry import MAX_RETRIES
from arkor_ray.errors import (
    ArkorError,
    AuthenticationError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    ServiceUnavailableError,
)
from arkor_ray.schemas.project import Project

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = httpx.Timeout(30.0, read=60.0)
#: Every follower holds a connection for as long as its job lasts, so their number is the caller's business.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)


class Session:
    """What `Client` and `AsyncClient` share; both may use the same session.

    Arguments that are None are looked up: the URL in `ARKOR_CLOUD_API_URL`, then in the credentials file; the token in
    that file, if it was stored for this URL, else a new anonymous one is asked for and stored; the project in
    `.arkor/state.json` under `project_dir`, else one named after that directory is created (or found) and stored.
    """

    def __init__(
        self,
        api_url: str | None = None,
        *,
        token: str | None = None,
        org: str | None = None,
        project: str | None = None,
        project_dir: Path | str | None = None,
        home: Path | str | None = None,
        transport: Any = None,
        max_retries: int = MAX_RETRIES,
    ) -> None:
        self.credential_store = CredentialStore(Path(home) if home is not None else None)
        self.base_url = self.credential_store.base_url(api_url)
        self.org = org
        self.project = project
        #: An httpx transport to use instead of the network; both clients must be able to use it.
        self.transport = transport
        #: How often a call that failed is sent again, where that is safe and may help (`retry.py`).
        self.max_retries = max_retries
        self._states = StateStore(Path(project_dir) if project_dir is not None else None)
        self._credentials = Credentials(token, org) if token else None
        self._warned: set[str] = set()

    @property
    def token(self) -> str | None:
        """The bearer token, None until one was needed."""
        return self._credentials.token if self._credentials else None

    def is_ready(self, call: Call[Any]) -> bool:
        """Whether everything that `call` needs is known already."""
        return (
            (not call.auth or self._credentials is not None)
            and (call.scope is Scope.NONE or self.org is not None)
            and (call.scope is not Scope.PROJECT or self.project is not None)
        )

    def prepare(self, call: Call[Any]) -> Flow[None]:
        """Find out what `call` needs. Calls that this flow yields need no more than what it found before them."""
        if call.auth and self._credentials is None:
            self._credentials = self.credential_store.load(self.base_url) or (yield from self.sign_in())
        if call.scope is not Scope.NONE and self.org is None:
            self.org = yield from self._find_org()
        if call.scope is Scope.PROJECT and self.project is None:
            self.project = yield from self._find_project()

    def sign_in(self) -> Flow[Credentials]:
        """Become a new anonymous identity, and remember it."""
        minted = yield calls.anonymous_token()
        org = minted.personal_org.slug
        self._credentials = self.credential_store.save(
            self.base_url, minted.token, org_slug=org, anonymous_id=minted.anonymous_id
        )
        return self._credentials

    def request(self, call: Call[Any]) -> dict[str, Any]:
        """The arguments of `httpx`'s `build_request`."""
        params = dict(call.params)
        if call.scope is not Scope.NONE and self.org:
            params["orgSlug"] = self.org
        if call.scope is Scope.PROJECT and self.project:
            params["projectSlug"] = self.project
        headers = {"X-Arkor-Client": f"arkor-ray/{__version__}", "Accept": "application/json", **call.headers}
        if call.auth and self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        request = {"method": call.method, "url": self.base_url + call.path, "params": params, "headers": headers}
        if call.body is not None:
            request["json"] = call.body
        return {**request, "timeout": call.timeout or DEFAULT_TIMEOUT}

    def check(self, response: httpx.Response) -> None:
        """Raise what an unsuccessful response stands for; its body must have been read."""
        self._note_advice(response)
        if response.is_success:
            return
        error = error_of(response)
        if isinstance(error, AuthenticationError) and self._credentials and self._credentials.path:
            raise with_hint(error, f"the token is that of {self._credentials.path}; `arkor-ray login` gets a new one")
        raise error

    def unreachable(self, error: httpx.HTTPError) -> ServiceUnavailableError:
        """What a request that got no answer is to the caller."""
        if isinstance(error, httpx.TimeoutException):
            reason, code = "no answer in time", "timeout"
        else:
            reason, code = str(error) or type(error).__name__, "unreachable"
        return ServiceUnavailableError(
            f"Cannot reach {self.base_url}: {reason}. Is the service running (`arkor-ray up`), and is the URL right?",
            code=code,
        )

    def _find_org(self) -> Flow[str]:
        assert self._credentials is not None
        if self._credentials.org_slug:
            return self._credentials.org_slug
        me = yield calls.me()
        slugs = [org.slug for org in me.orgs]
        if not slugs:
            raise PermissionDeniedError("This token's owner belongs to no organisation; ask the operator to add one.")
        state = self._states.load(self.base_url, beside=False)
        return state.org_slug if state and state.org_slug in slugs else slugs[0]

    def _find_project(self) -> Flow[str]:
        assert self.org is not None
        credentials = self._credentials
        beside = credentials is not None and credentials.beside
        by_hand = credentials is None or credentials.path is None
        state = self._states.load(self.base_url, beside=beside)
        if state and state.org_slug == self.org:
            return state.project_slug
        if state and not by_hand:
            raise InvalidRequestError(
                f"{state.path} belongs to the organisation {state.org_slug!r}, the credentials to {self.org!r}; "
                "delete that file to start a new project here, or name a project of that organisation",
                param="projectSlug",
            )
        name = self._states.directory.name
        project = yield from ensure_project(name or "project", project_slug(name))
        if not by_hand:
            self._states.save(
                self.base_url, beside=beside, org_slug=self.org, project_slug=project.slug, project_id=project.id
            )
        return project.slug

    def _note_advice(self, response: httpx.Response) -> None:
        """Deprecation headers are advice about this client, told once."""
        if response.headers.get("Deprecation") != "true":
            return
        warning = response.headers.get("Warning", "")
        text = warning.partition('"')[2].rstrip('"') or warning or "this client is deprecated"
        sunset = response.headers.get("Sunset")
        advice = f"{text} (until {sunset})" if sunset else text
        if advice not in self._warned:
            self._warned.add(advice)
            logger.warning("%s: %s", self.base_url, advice)


def ensure_project(name: str, slug: str) -> Flow[Project]:
    """The project with this slug in the caller's organisation, created if there is none."""
    try:
        return (yield calls.create_project(name, slug))
    except ConflictError:
        for project in (yield calls.list_projects()):
            if project.slug == slug:
                return project
        raise NotFoundError(f"The project slug {slug!r} is taken in this organisation, but not listed") from None


def with_hint(error: ArkorError, hint: str) -> ArkorError:
    return type(error)(f"{error.message} ({hint})", code=error.code, status=error.http_status, **error.fields)
