"""What the recorder writes to the database: in order, many at a time, and never dropped for a database that is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.exc import DataError, DBAPIError, SQLAlchemyError, StatementError
from sqlalchemy.orm import Session

from arkor_ray.db.session import DATABASE_AWAY, Database, reason
from arkor_ray.errors import InternalError, ServiceUnavailableError
from arkor_ray.events.publisher import JobEndedError, StaleAttemptError

logger = logging.getLogger(__name__)

MAX_BATCH = 200  # operations in one transaction

T = TypeVar("T")


class JobWriter:
    """Of one job, on one event loop. `ended`: the job has its last word or a newer attempt, and nothing more is written."""

    def __init__(self, db: Database) -> None:
        self.ended = False
        self._db = db
        self._writes: asyncio.Queue[tuple[Callable[[Session], Any], asyncio.Future[Any]]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def write(self, operation: Callable[[Session], T]) -> T | None:
        """Runs `operation` in the next transaction, in order of calls; None if the job has ended.

        Raises what it raises; for the database's own errors InternalError where the values are at fault, and
        ServiceUnavailableError for the others, which trying again may mend.
        """
        if self.ended:
            return None
        if self._task is None:
            self._task = asyncio.create_task(self._write_forever())
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._writes.put_nowait((operation, done))
        return await done

    async def _write_forever(self) -> None:
        """All that waits goes into one transaction: a burst of logs costs one commit."""
        while True:
            batch = [await self._writes.get()]
            while not self._writes.empty() and len(batch) < MAX_BATCH:
                batch.append(self._writes.get_nowait())
            await self._settle(batch)

    async def _settle(self, batch: list[tuple[Callable[[Session], Any], asyncio.Future[Any]]]) -> None:
        """Commits a batch and answers its callers. One that cannot be written must not undo or hold up its neighbours."""
        try:
            results = await self._commit([operation for operation, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    await self._settle([entry])
                return
            ((_, done),) = batch
            over = isinstance(error, JobEndedError | StaleAttemptError)
            self.ended |= over
            if done.cancelled():
                return
            if over:
                done.set_result(None)
            else:
                done.set_exception(_plain(error))
            return
        for (_, done), result in zip(batch, results, strict=True):
            if not done.cancelled():
                done.set_result(result)

    async def _commit(self, operations: list[Callable[[Session], Any]]) -> list[Any]:
        """One transaction. A database that is away is waited for: events are never dropped for its sake."""
        delay = 0.1
        while True:
            try:
                return await asyncio.to_thread(self._transaction, operations)
            except DATABASE_AWAY:
                logger.warning("The database does not take events; trying again in %.1f s", delay, exc_info=True)
                await asyncio.sleep(delay)
                delay = min(2 * delay, 5.0)

    def _transaction(self, operations: list[Callable[[Session], Any]]) -> list[Any]:
        with self._db.write() as session:
            return [operation(session) for operation in operations]


def _plain(error: Exception) -> Exception:
    """The database's error without its classes, which the process that asked need not have installed."""
    if not isinstance(error, SQLAlchemyError):
        return error
    sentence = f"The database did not take it: {type(error).__name__}: {reason(error)}"
    # A statement that did not get as far as the driver, or a value that does not fit its column.
    if isinstance(error, DataError) or (isinstance(error, StatementError) and not isinstance(error, DBAPIError)):
        return InternalError(sentence)
    return ServiceUnavailableError(sentence)
