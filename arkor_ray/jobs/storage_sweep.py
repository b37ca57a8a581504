"""The controller's sweep of the storage: now and then, in a thread of its own, since a large storage takes minutes."""

from __future__ import annotations

import logging
import threading
import time

from arkor_ray.db.session import Database
from arkor_ray.errors import ConflictError
from arkor_ray.jobs import garbage
from arkor_ray.settings import Settings
from arkor_ray.storage import open_store

logger = logging.getLogger(__name__)

FIRST_S = 600.0  # after the start, which has other things to do
EVERY_S = 6 * 3600.0


class StorageSweep:
    def __init__(self, settings: Settings, db: Database) -> None:
        self._settings = settings
        self._db = db
        self._next = time.monotonic() + FIRST_S
        self._thread: threading.Thread | None = None

    def tick(self) -> None:
        """Starts the next sweep when it is due, and returns at once."""
        now = time.monotonic()
        if now < self._next or (self._thread is not None and self._thread.is_alive()):
            return
        self._next = now + EVERY_S
        self._thread = threading.Thread(target=self._run, name="storage-sweep", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the sweep under way has ended."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        settings = self._settings
        try:
            store = open_store(settings.storage_url, endpoint_url=settings.s3_endpoint_url)
            report = garbage.sweep(settings, self._db, store, dry_run=False)
        except ConflictError as error:
            logger.info("No sweep of the storage now: %s", error.message)
            return
        except Exception:  # nobody waits for this thread; the next sweep tries again
            logger.exception("The sweep of the storage failed")
            return
        for why, amount in report.removed.items():
            logger.info("Swept from storage: %s, %d objects, %d bytes", why, amount.objects, amount.size)
        for problem in report.problems:
            logger.warning("The sweep of the storage ended early: %s", problem)
