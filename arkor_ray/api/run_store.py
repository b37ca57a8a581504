"""Keeping what endpoints answered: off the path of the answer, in batches, and never at its cost."""

from __future__ import annotations

import logging
import threading
from collections import deque

from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from arkor_ray.db import runs
from arkor_ray.db.runs import NewRun
from arkor_ray.db.session import DATABASE_AWAY, Database

logger = logging.getLogger(__name__)

MAX_WAITING = 2_000  # runs that may wait to be written,
MAX_WAITING_BYTES = 64 * 2**20  # and roughly their size in memory; beyond either, new ones are dropped
BATCH = 200
LINGER_S = 0.2  # how long a run waits for others to be written with it
RETRY_S = 1.0
CLOSE_S = 5.0  # how long the process waits for the last ones at its end


class RunStore:
    """A bounded queue and one thread that writes it. `dropped` counts the runs that were not stored."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._waiting: deque[tuple[NewRun, int]] = deque()
        self._held = self._held_bytes = 0  # waiting, or being written
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._writer: threading.Thread | None = None
        self.dropped = 0
        self._dropped_told = 0

    def keep(self, run: NewRun, size: int) -> None:
        """Returns at once. `size`: roughly the run's bytes in memory."""
        with self._changed:
            full = self._held >= MAX_WAITING or self._held_bytes + size > MAX_WAITING_BYTES
            if full or self._closing.is_set():
                self._drop(1)
                return
            self._waiting.append((run, size))
            self._held += 1
            self._held_bytes += size
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_all, name="runs", daemon=True)
                self._writer.start()
            self._changed.notify()

    def close(self) -> None:
        """Returns once everything kept so far is written, or after `CLOSE_S`."""
        with self._changed:
            self._closing.set()
            self._changed.notify()
        if self._writer is not None:
            self._writer.join(CLOSE_S)
        with self._changed:
            self._drop(self._held)
            self._held = 0
        self._tell_dropped()

    def _write_all(self) -> None:
        while batch := self._next_batch():
            self._write([run for run, _ in batch])
            with self._changed:
                self._held = max(0, self._held - len(batch))
                self._held_bytes -= sum(size for _, size in batch)
            self._tell_dropped()

    def _next_batch(self) -> list[tuple[NewRun, int]]:
        """Empty once the store is closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
            self._changed.wait_for(lambda: len(self._waiting) >= BATCH or self._closing.is_set(), LINGER_S)
            return [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]

    def _write(self, batch: list[NewRun]) -> None:
        while True:
            last_try = self._closing.is_set()
            try:
                with self._db.write() as session:
                    runs.add_all(session, batch)
                return
            except DATABASE_AWAY as error:
                logger.warning("Could not store %d runs yet: %s", len(batch), type(error).__name__)
                if last_try:
                    self._drop(len(batch))
                    return
                self._closing.wait(RETRY_S)
            except SQLAlchemyError as error:
                if len(batch) > 1:  # what is wrong with one must not cost the others
                    for run in batch:
                        self._write([run])
                elif isinstance(error, IntegrityError):
                    logger.info("Run %s is stored already, or its endpoint was deleted", batch[0].id)
                else:
                    logger.exception("Could not store run %s", batch[0].id)
                    self._drop(1)
                return

    def _drop(self, count: int) -> None:
        with self._changed:
            if count and self.dropped == self._dropped_told:
                logger.warning("Runs are dropped: the database does not take them as fast as they come")
            self.dropped += count

    def _tell_dropped(self) -> None:
        if self.dropped > self._dropped_told:
            logger.warning("%d runs were not stored", self.dropped - self._dropped_told)
            self._dropped_told = self.dropped
