"""An event loop on a thread of its own, on which synchronous code runs the asynchronous core.

So `Trainer.wait()` also works in a thread that runs a loop itself, such as a notebook's.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_owner: int | None = None


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine there and wait for it. An interrupt here cancels it there."""
    return run_with_errands(lambda run_here: work)


def run_with_errands(make: Callable[[Callable[[Callable[[], Any]], Any]], Coroutine[Any, Any, T]]) -> T:
    """Run `make(run_here)` there and wait for it; `await run_here(function)` calls a function back in this thread."""
    errands: queue.SimpleQueue[_Errand | None] = queue.SimpleQueue()

    async def run_here(function: Callable[[], Any]) -> Any:
        errand = _Errand(function)
        errands.put(errand)
        return await asyncio.wrap_future(errand.done)

    working = asyncio.run_coroutine_threadsafe(make(run_here), _running_loop())
    working.add_done_callback(lambda _: errands.put(None))
    try:
        while (errand := errands.get()) is not None:
            errand.run()
        return working.result()
    finally:
        working.cancel()


class _Errand:
    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.done: Future[Any] = Future()

    def run(self) -> None:
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except StopIteration as error:  # which a future cannot carry
            failure = RuntimeError("a callback raised StopIteration")
            failure.__cause__ = error
            self.done.set_exception(failure)
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(result)


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop, _owner
    with _lock:
        if _loop is None or _owner != os.getpid():  # a fork has the loop's object, but not its thread
            _loop, _owner = asyncio.new_event_loop(), os.getpid()
            threading.Thread(target=_loop.run_forever, name="arkor-ray-client", daemon=True).start()
        return _loop
