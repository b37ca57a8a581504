"""When a token was last used: told roughly, off the request's path, and never at its cost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from sqlalchemy.exc import SQLAlchemyError

from arkor_ray.db import identities
from arkor_ray.db.identities import Caller
from arkor_ray.db.session import Database
from arkor_ray.schemas.base import utcnow

logger = logging.getLogger(__name__)

PRECISION = timedelta(minutes=5)


class LastUsed:
    """Writes a token's last use at most once per `PRECISION`, in one thread of its own."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="last-used")
        self._waiting: set[str] = set()
        self._lock = threading.Lock()

    def note(self, caller: Caller) -> None:
        known = caller.token_last_used_at
        if known is not None and utcnow() - known < PRECISION:
            return
        with self._lock:
            if caller.token_id in self._waiting:
                return
            self._waiting.add(caller.token_id)
        self._submit(lambda: self._write(caller.token_id))

    def close(self) -> None:
        """Returns once everything noted so far is written."""
        self._writer.shutdown()

    def _submit(self, write: Callable[[], None]) -> None:
        try:
            self._writer.submit(write)
        except RuntimeError:  # closed: the process is ending, and this is only a hint for people
            logger.debug("Not noting a last use while shutting down")

    def _write(self, token_id: str) -> None:
        try:
            with self._db.write() as session:
                identities.touch_token(session, token_id)
        except SQLAlchemyError:
            logger.warning("Could not note the last use of token %s", token_id, exc_info=True)
        finally:
            with self._lock:
                self._waiting.discard(token_id)
