"""Many askers, one piece of work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Runs at most one coroutine per key and event loop at a time; everyone who asks meanwhile gets its result.

    A caller that is cancelled cancels nothing for the others, and the work goes on even when all of them are gone.
    Nothing is kept after the end: a failure reaches those who waited for it, the next to ask tries again.
    """

    def __init__(self) -> None:
        self._running: dict[tuple[int, str], asyncio.Task[T]] = {}

    async def run(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        slot = (id(asyncio.get_running_loop()), key)
        task = self._running.get(slot)
        if task is None:
            task = asyncio.ensure_future(_call(work))
            self._running[slot] = task
            task.add_done_callback(lambda done: self._finish(slot, done))
        return await asyncio.shield(task)

    def _finish(self, slot: tuple[int, str], task: asyncio.Task[T]) -> None:
        self._running.pop(slot, None)
        if not task.cancelled():
            task.exception()  # looked at, so that work without a waiter left does not complain when collected


async def _call(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
