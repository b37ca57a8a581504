"""How the train loop tells the world what happens: the `EventSink`, and its forms.

Calls are one-way and never wait for the network; the loop holds no plumbing. After a restart everything may be told
again: the recorder drops what it already has.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any, Protocol

from arkor_ray.errors import TrainingError

logger = logging.getLogger(__name__)

STOP_POLL_SECONDS = 0.5
MAX_IN_FLIGHT = 512  # a checkpoint's call takes as long as serving needs to load it; logs must not wait behind them


class EventSink(Protocol):
    """Where rank 0 reports. Safe to call from several threads; calls arrive in the order in which they are made."""

    def started(self, metadata: dict[str, Any]) -> None:
        """Training begins or goes on; plain JSON about model, plan and steps."""

    def log(self, entry: dict[str, Any]) -> None:
        """{"step": int, "loss"?, "eval_loss"?, "learning_rate"?, "epoch"?, "samples_per_second"?}; floats may be nan."""

    def notice(self, type: str, data: dict[str, Any]) -> None:
        """An event of our own, such as "checkpoint.delayed"."""

    def stage(self, adapter_id: str, data: bytes) -> None:
        """The verified `adapter_model.safetensors`, before it is uploaded, so that the push to serving runs beside."""

    def checkpoint(self, manifest: dict[str, Any]) -> None:
        """A checkpoint is committed in storage."""

    def should_stop(self) -> bool:
        """Whether the job was cancelled; a cached answer."""

    def flush(self, timeout: float) -> None:
        """Returns when all that was told so far is durable; raises TrainingError when that takes longer than `timeout` s."""

    def close(self) -> None:
        """Nothing more will be told. Does not wait: what is not flushed may be lost with the process."""


class NullEventSink:
    """For ranks other than 0, and for a bare run."""

    def started(self, metadata: dict[str, Any]) -> None: ...
    def log(self, entry: dict[str, Any]) -> None: ...
    def notice(self, type: str, data: dict[str, Any]) -> None: ...
    def stage(self, adapter_id: str, data: bytes) -> None: ...
    def checkpoint(self, manifest: dict[str, Any]) -> None: ...
    def flush(self, timeout: float) -> None: ...
    def close(self) -> None: ...

    def should_stop(self) -> bool:
        return False


class ListEventSink(NullEventSink):
    """Keeps everything in order in `calls`, as (method, *arguments); for tests. `stop_after_step` asks for a stop by itself."""

    def __init__(self, stop_after_step: int | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.stop = False
        self._stop_after_step = stop_after_step

    def started(self, metadata: dict[str, Any]) -> None:
        self.calls.append(("started", metadata))

    def log(self, entry: dict[str, Any]) -> None:
        self.calls.append(("log", entry))
        self.stop |= self._stop_after_step is not None and entry["step"] >= self._stop_after_step

    def notice(self, type: str, data: dict[str, Any]) -> None:
        self.calls.append(("notice", type, data))

    def stage(self, adapter_id: str, data: bytes) -> None:
        self.calls.append(("stage", adapter_id, data))

    def checkpoint(self, manifest: dict[str, Any]) -> None:
        self.calls.append(("checkpoint", manifest))

    def should_stop(self) -> bool:
        return self.stop

    def of(self, method: str) -> list[Any]:
        """The first argument of each call of `method`."""
        return [call[1] for call in self.calls if call[0] == method]


class RayEventSink:
    """Sends to the job's recorder actor from a thread of its own, a bounded number of calls in flight.

    Ray sends a call again when the recorder restarts, so nothing is lost with it.
    """

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(maxsize=10_000)
        self._unfinished = 0
        self._done = threading.Condition()
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._send_all, name="event-sink", daemon=True),
            threading.Thread(target=self._watch_stop, name="event-sink-stop", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def started(self, metadata: dict[str, Any]) -> None:
        self._put("started", metadata)

    def log(self, entry: dict[str, Any]) -> None:
        self._put("log", entry)

    def notice(self, type: str, data: dict[str, Any]) -> None:
        self._put("notice", type, data)

    def stage(self, adapter_id: str, data: bytes) -> None:
        self._put("stage", adapter_id, data)

    def checkpoint(self, manifest: dict[str, Any]) -> None:
        self._put("checkpoint", manifest)

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def flush(self, timeout: float) -> None:
        with self._done:
            if not self._done.wait_for(lambda: self._unfinished == 0, timeout):
                raise TrainingError(f"{self._unfinished} events did not reach the job's recorder within {timeout:g} s.")
            if self._error is not None:
                raise TrainingError(f"The job's recorder refused an event: {self._error}") from self._error

    def close(self) -> None:
        self._closed.set()
        self._queue.put(None)

    def _put(self, method: str, *args: Any) -> None:
        with self._done:
            self._unfinished += 1
        self._queue.put((method, args))

    def _send_all(self) -> None:
        import ray

        in_flight: list[Any] = []
        while True:
            try:
                item = self._queue.get(timeout=0.05 if in_flight else None)
            except queue.Empty:
                item = ("", ())
            if item is None:
                return
            method, args = item
            if method:
                in_flight.append(getattr(self._recorder, method).remote(*args))
            full = len(in_flight) >= MAX_IN_FLIGHT
            if in_flight:
                count, timeout = (1, None) if full else (len(in_flight), 0)
                ready, in_flight = ray.wait(in_flight, num_returns=count, timeout=timeout)
                for ref in ready:
                    self._finish(ref)

    def _finish(self, ref: Any) -> None:
        import ray

        try:
            ray.get(ref)
        except Exception as error:  # raised again by flush()
            logger.error("The recorder refused an event: %s", error)
            self._error = self._error or error
        with self._done:
            self._unfinished -= 1
            self._done.notify_all()

    def _watch_stop(self) -> None:
        import ray

        while not self._closed.wait(STOP_POLL_SECONDS):
            try:
                if ray.get(self._recorder.should_stop.remote(), timeout=30):
                    self._stop.set()
                    return
            except Exception as error:  # the recorder is restarting; the next poll tells
                logger.warning("Cannot ask the recorder whether to stop: %s", error)
                time.sleep(1)
