"""How the train loop tells the world what happens: the `EventSink`, and its forms.

Calls are one-way and never wait for the network; the loop holds no plumbing. After a restart everything may be told
again: the recorder drops what it already has.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from typing import Any, Protocol

from arkor_ray.errors import ServiceUnavailableError, TrainingError

logger = logging.getLogger(__name__)

STOP_POLL_SECONDS = 0.5
MAX_BATCH = 200  # reports in one call


class EventSink(Protocol):
    """Where rank 0 reports. Safe to call from several threads; calls arrive in the order in which they are made."""

    def started(self, metadata: dict[str, Any]) -> None:
        """Training begins or goes on; plain JSON about model, plan and steps."""

    def log(self, entry: dict[str, Any]) -> None:
        """{"step": int, "loss"?, "eval_loss"?, "learning_rate"?, "epoch"?, "samples_per_second"?}; floats may be nan."""

    def unrecorded(self) -> list[dict[str, Any]]:
        """Log entries not yet known to be durable, in their order. A resume state carries them: they would be lost with this
        process, and the run that goes on from there does not pass their steps again."""

    def notice(self, type: str, data: dict[str, Any]) -> None:
        """An event of our own, such as "checkpoint.delayed"."""

    def stage(self, adapter_id: str, data: bytes) -> None:
        """The verified `adapter_model.safetensors`, before it is uploaded, so that the push to serving runs beside."""

    def checkpoint(self, manifest: dict[str, Any]) -> None:
        """A checkpoint is committed in storage."""

    def should_stop(self) -> bool:
        """Whether the job was cancelled; a cached answer."""

    def flush(self, timeout: float) -> None:
        """Returns when all that was told is durable. Raises ServiceUnavailableError when nothing at all became so for `timeout`
        s, TrainingError when some of it was refused."""

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

    def unrecorded(self) -> list[dict[str, Any]]:
        return []

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
    """Sends to the job's recorder actor, from threads of its own, in two lanes of one call at a time each.

    Ray repeats a call whose recorder died, but not in order with others in flight; so each lane has only one. The first lane
    takes all that waits in one call. The second has the checkpoints, whose calls last until serving has loaded them; each
    waits for what was told before it.
    """

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._reports: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue()
        self._checkpoints: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue()
        self._progress = threading.Condition()
        self._told = self._durable = 0  # reports of the first lane: handed to us, and acknowledged
        self._unrecorded: deque[tuple[int, dict[str, Any]]] = (
            deque()
        )  # log entries, each with its place among the reports
        self._announcing = 0  # checkpoints not yet acknowledged
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._closed = threading.Event()
        for target in (self._send_reports, self._send_checkpoints, self._watch_stop):
            threading.Thread(target=target, name="event-sink", daemon=True).start()

    def started(self, metadata: dict[str, Any]) -> None:
        self._report("started", metadata)

    def log(self, entry: dict[str, Any]) -> None:
        with self._progress:
            self._report("log", entry)
            self._unrecorded.append((self._told, entry))

    def unrecorded(self) -> list[dict[str, Any]]:
        with self._progress:
            return [entry for _, entry in self._unrecorded]

    def notice(self, type: str, data: dict[str, Any]) -> None:
        self._report("notice", type, data)

    def stage(self, adapter_id: str, data: bytes) -> None:
        # Not waited for: an adapter that was not staged, or whose recorder died, is read from storage.
        self._recorder.stage.remote(adapter_id, data)

    def checkpoint(self, manifest: dict[str, Any]) -> None:
        with self._progress:
            self._announcing += 1
            self._checkpoints.put((self._told, manifest))

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def flush(self, timeout: float) -> None:
        with self._progress:
            while self._announcing or self._durable < self._told:
                before = (self._announcing, self._durable)
                if self._progress.wait_for(lambda before=before: (self._announcing, self._durable) != before, timeout):  # type: ignore[misc]
                    continue
                # Not the end of the job: all its work is in storage, where the next attempt finds it.
                raise ServiceUnavailableError(
                    f"{self._told - self._durable} events and {self._announcing} checkpoints did not reach the job's "
                    f"recorder within {timeout:g} s."
                )
            if self._error is not None:
                raise TrainingError(f"The job's recorder refused an event: {self._error}") from self._error

    def close(self) -> None:
        self._closed.set()
        self._reports.put(None)
        self._checkpoints.put(None)

    def _report(self, method: str, *args: Any) -> None:
        with self._progress:
            self._told += 1
            self._reports.put((method, args))

    def _send_reports(self) -> None:
        while (item := self._reports.get()) is not None:
            batch = [item]
            while len(batch) < MAX_BATCH and not self._reports.empty():
                following = self._reports.get()
                if following is None:
                    self._reports.put(None)
                    break
                batch.append(following)
            recorded = self._call("tell", batch)
            with self._progress:
                self._durable += len(batch)
                while recorded and self._unrecorded and self._unrecorded[0][0] <= self._durable:
                    self._unrecorded.popleft()
                self._progress.notify_all()

    def _send_checkpoints(self) -> None:
        while (item := self._checkpoints.get()) is not None:
            told_before, manifest = item
            with self._progress:
                self._progress.wait_for(lambda before=told_before: self._durable >= before)  # type: ignore[misc]
            self._call("checkpoint", manifest)
            with self._progress:
                self._announcing -= 1
                self._progress.notify_all()

    def _call(self, method: str, *args: Any) -> Any:
        """Its answer, when the recorder has it for good; None if it refused, which flush() raises again."""
        import ray

        try:
            return ray.get(getattr(self._recorder, method).remote(*args))
        except Exception as error:
            logger.error("The recorder refused %s: %s", method, error)
            self._error = self._error or error
            return None

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
