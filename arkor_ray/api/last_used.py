"""When a token or a key was last used: told roughly, off the request's path, and never at its cost."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from arkor_ray.db.session import Database
from arkor_ray.schemas.base import utcnow

logger = logging.getLogger(__name__)

PRECISION = timedelta(minutes=5)
REMEMBERED = 10_000  # ids whose last note is known without the database; others are written more often, at worst


class LastUsed:
    """Writes the last use of each id at most once per `PRECISION`, in one thread of its own.

    Args:
        touch: sets the last use of an id to now.
    """

    def __init__(self, db: Database, touch: Callable[[Session, str], None]) -> None:
        self._db = db
        self._touch = touch
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="last-used")
        self._noted: OrderedDict[str, datetime] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, id: str, known: datetime | None = None) -> None:
        """`id` is used now. `known`: the last use that the database has, where the caller has just read it."""
        now = utcnow()
        with self._lock:
            if any(last is not None and now - last < PRECISION for last in (known, self._noted.get(id))):
                return
            self._noted[id] = now
            self._noted.move_to_end(id)
            if len(self._noted) > REMEMBERED:
                self._noted.popitem(last=False)
        self._submit(lambda: self._write(id))

    def close(self) -> None:
        """Returns once everything noted so far is written."""
        self._writer.shutdown()

    def _submit(self, write: Callable[[], None]) -> None:
        try:
            self._writer.submit(write)
        except RuntimeError:  # closed: the process is ending, and this is only a hint for people
            logger.debug("Not noting a last use while shutting down")

    def _write(self, id: str) -> None:
        try:
            with self._db.write() as session:
                self._touch(session, id)
        except SQLAlchemyError:
            logger.warning("Could not note the last use of %s", id, exc_info=True)
            with self._lock:
                self._noted.pop(id, None)  # the next use tries again
