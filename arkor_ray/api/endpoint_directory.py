"""What the public route knows of endpoints, kept in memory so that a request does not wait for the database."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import Literal, cast

from pydantic import TypeAdapter

from arkor_ray.api.last_used import LastUsed
from arkor_ray.db import endpoints
from arkor_ray.db.endpoints import Published
from arkor_ray.db.identities import digest
from arkor_ray.db.session import DATABASE_AWAY, Database
from arkor_ray.errors import AuthenticationError, ModelError, NotFoundError, ServiceUnavailableError
from arkor_ray.schemas.endpoint import SLUG, EndpointTarget, ServedAdapter, ServedBaseModel
from arkor_ray.serving.single_flight import SingleFlight
from arkor_ray.settings import Settings

logger = logging.getLogger(__name__)

LOOK_S = 0.5  # how long a change made by another process may go unseen
TRUSTED_S = 60.0  # how long entries are served after the last look that succeeded
READ_LIMIT_S = 5.0
READERS = 4
MAX_WAITING = 256  # reads that run or wait; beyond them a flood of new slugs is turned away
KEPT = 4096  # slugs with an endpoint, and as many without one

_TARGET: TypeAdapter[ServedAdapter | ServedBaseModel] = TypeAdapter(EndpointTarget)


@dataclass(frozen=True)
class ServedEndpoint:
    """An enabled endpoint as the public route needs it; never holds a plaintext key."""

    id: str
    slug: str
    org_id: str
    project_id: str
    auth_mode: Literal["none", "fixed_api_key"]
    model: str  # the name that answers carry
    base_model: str  # where the base is loaded from
    base_precision: str | None
    adapter_id: str | None
    run_retention_mode: str  # "unlimited" | "disabled" | "days"
    run_retention_days: int | None
    keys: Mapping[str, str]  # SHA-256 of a valid key to its id
    created_at: datetime


@dataclass(frozen=True)
class _Entry:
    endpoint: ServedEndpoint | None  # None: there is no such endpoint, or it is disabled
    version: int | None
    read_at: float


class EndpointDirectory:
    """Finds endpoints by slug and checks their keys.

    The first request for a slug reads the database, later ones do not. A thread looks every `look_s` whether anything
    changed and drops what did, so a revocation made through another process takes effect within that time, and one made
    through this process at once (`invalidate`). Entries outlive a database that is away by `TRUSTED_S`, not more.
    """

    def __init__(self, db: Database, settings: Settings, *, look_s: float = LOOK_S) -> None:
        self._db = db
        self._settings = settings
        self._look_s = look_s
        self._last_used = LastUsed(db, endpoints.touch_key)
        self._lock = threading.Lock()
        # Two tables, so that a flood of slugs that do not exist pushes out none that does.
        self._known: OrderedDict[str, _Entry] = OrderedDict()
        self._unknown: OrderedDict[str, _Entry] = OrderedDict()
        self._generation = 0  # grows when something changed: what was being read then is not kept
        self._looked_at = float("-inf")
        self._seen_version: int | None = None
        self._flights: SingleFlight[_Entry] = SingleFlight()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="endpoints")
        self._room = threading.Semaphore(MAX_WAITING)
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    async def find(self, slug: str) -> ServedEndpoint:
        """The enabled endpoint of that slug.

        Raises NotFoundError if there is none, ServiceUnavailableError if that cannot be told without the database.
        """
        entry = self._cached(slug)
        if entry is None and SLUG.fullmatch(slug):
            generation = self._generation
            # Whoever asks after a change must not join a read that began before it.
            entry = await self._flights.run(f"{generation}/{slug}", lambda: self._load(slug, generation))
        if entry is None or entry.endpoint is None:
            raise NotFoundError(f"No endpoint {slug[:64]!r}, or it is disabled")
        return entry.endpoint

    def authorize(self, endpoint: ServedEndpoint, key: str | None) -> str | None:
        """The id of the key, None where the endpoint asks for none. Raises AuthenticationError."""
        if endpoint.auth_mode == "none":
            return None
        if not key:
            raise AuthenticationError("No key. Send `Authorization: Bearer <key>` or `x-api-key: <key>`")
        key_id = endpoint.keys.get(digest(key))
        if key_id is None:
            raise AuthenticationError("The key is not one of this endpoint, or it was revoked")
        self._last_used.note(key_id)
        return key_id

    def invalidate(self, slug: str | None = None) -> None:
        """Forgets an endpoint, or all: to be called after the commit of a change made by this process."""
        with self._lock:
            self._generation += 1
            for table in (self._known, self._unknown):
                if slug is None:
                    table.clear()
                else:
                    table.pop(slug, None)

    def close(self) -> None:
        """Ends the threads, once the last uses noted so far are written."""
        self._closed.set()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._last_used.close()
        if self._watcher is not None:
            self._watcher.join(READ_LIMIT_S)

    def _cached(self, slug: str) -> _Entry | None:
        with self._lock:
            for table in (self._known, self._unknown):
                entry = table.get(slug)
                if entry is not None and monotonic() - max(entry.read_at, self._looked_at) <= TRUSTED_S:
                    table.move_to_end(slug)
                    return entry
        return None

    async def _load(self, slug: str, generation: int) -> _Entry:
        self._watch()
        if not self._room.acquire(blocking=False):
            raise ServiceUnavailableError("Too many endpoints are asked for at once; try again", retry_after=1)
        read = self._readers.submit(self._read, slug)
        read.add_done_callback(lambda _: self._room.release())
        try:
            async with asyncio.timeout(READ_LIMIT_S):
                entry = await asyncio.wrap_future(read)
        except (*DATABASE_AWAY, TimeoutError) as error:
            logger.warning("Could not read endpoint %s: %s", slug, type(error).__name__)
            raise ServiceUnavailableError("The database cannot be reached; try again", retry_after=2) from error
        with self._lock:
            if generation == self._generation:
                self._keep(slug, entry)
        return entry

    def _keep(self, slug: str, entry: _Entry) -> None:
        gone, table = (self._unknown, self._known) if entry.endpoint else (self._known, self._unknown)
        gone.pop(slug, None)
        table[slug] = entry
        table.move_to_end(slug)
        if len(table) > KEPT:
            table.popitem(last=False)

    def _read(self, slug: str) -> _Entry:
        """Runs in a thread."""
        began = monotonic()
        with self._db.read() as session:
            published = endpoints.find_published(session, slug)
            if published is None:
                return _Entry(None, None, began)
            return _Entry(self._served(published), published.endpoint.version, began)

    def _served(self, published: Published) -> ServedEndpoint | None:
        row, checkpoint = published.endpoint, published.checkpoint
        target = _TARGET.validate_python(row.target)
        if isinstance(target, ServedAdapter):
            assert checkpoint is not None
            base_model, precision = checkpoint.base_model, checkpoint.base_precision
        else:
            try:
                base_model, precision = self._settings.resolve_model(target.base_model), None
            except ModelError as error:  # the operator took it out of the catalogue, which is like disabling it
                logger.warning("Endpoint %s cannot be served: %s", row.slug, error.message)
                return None
        return ServedEndpoint(
            id=row.id,
            slug=row.slug,
            org_id=row.org_id,
            project_id=row.project_id,
            auth_mode=cast(Literal["none", "fixed_api_key"], row.auth_mode),
            model=target.model,
            base_model=base_model,
            base_precision=precision,
            adapter_id=row.adapter_id,
            run_retention_mode=row.run_retention_mode,
            run_retention_days=row.run_retention_days,
            keys=published.keys,
            created_at=row.created_at,
        )

    def _watch(self) -> None:
        with self._lock:
            if self._watcher is None and not self._closed.is_set():
                self._watcher = threading.Thread(target=self._look_again, name="endpoint-changes", daemon=True)
                self._watcher.start()

    def _look_again(self) -> None:
        failing = False
        while not self._closed.wait(self._look_s):
            try:
                self._look()
                failing = False
            except Exception:
                # A database that restarts is waited for, and nothing else may end the thread that sees revocations.
                if not failing:
                    logger.warning("Could not look for changed endpoints; trying on", exc_info=True)
                failing = True

    def _look(self) -> None:
        """Drops the entries that changed since the last look."""
        began = monotonic()
        with self._db.read() as session:
            version = endpoints.version(session)
            if version != self._seen_version:
                with (
                    self._lock
                ):  # after the version was read: what was kept until now is compared, what comes is not kept
                    self._generation += 1
                    kept = {**self._unknown, **self._known}
                current = endpoints.versions(session, kept)
                with self._lock:
                    for slug, entry in kept.items():
                        if current.get(slug) != entry.version:
                            for table in (self._known, self._unknown):
                                if table.get(slug) is entry:
                                    del table[slug]
        self._seen_version = version
        with self._lock:
            self._looked_at = began
