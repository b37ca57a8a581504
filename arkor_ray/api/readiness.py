"""Whether this process can serve: asks each part it needs, with a time limit, and never twice at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sqlalchemy import text

from arkor_ray.db.session import Database
from arkor_ray.storage import ObjectStore, layout

logger = logging.getLogger(__name__)

LIMIT_S = 5.0
OK = "ok"


class Readiness:
    """Named checks, each a function that blocks and raises when its part is not well."""

    def __init__(self, checks: dict[str, Callable[[], object]]) -> None:
        self._checks = checks
        # A part that hangs keeps one thread, however often it is asked about.
        self._running: dict[str, asyncio.Task[str]] = {}

    async def report(self) -> dict[str, str]:
        """For each part "ok", or what is wrong in words that may be shown to anybody."""
        states = await asyncio.gather(*(self._state(name) for name in self._checks))
        return dict(zip(self._checks, states, strict=True))

    async def _state(self, name: str) -> str:
        task = self._running.get(name)
        if task is None or task.done():
            task = self._running[name] = asyncio.create_task(self._run(name))
        done, _ = await asyncio.wait({task}, timeout=LIMIT_S)
        return task.result() if done else f"does not answer within {LIMIT_S:g} s"

    async def _run(self, name: str) -> str:
        try:
            await asyncio.to_thread(self._checks[name])
        except Exception as error:
            # Whatever it is, the part is not ready; the message may name hosts and paths, so only its kind is shown.
            logger.warning("Not ready: %s", name, exc_info=True)
            return f"fails with {type(error).__name__}; the server's log says more"
        return OK


def of_parts(db: Database, store: ObjectStore) -> Readiness:
    def database() -> None:
        with db.read() as session:
            session.execute(text("SELECT 1 FROM leases WHERE 1 = 0"))  # also fails while the schema is missing

    return Readiness({"database": database, "storage": lambda: store.head(layout.probe_key())})
