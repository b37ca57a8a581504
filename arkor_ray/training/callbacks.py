"""How the train loop tells the world what happens: the `EventSink`, and its forms.

Calls are one-way and never wait for the network; the loop holds no plumbing. After a restart everything may be told
again: the recorder drops what it already has.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from typing import Any, Protocol

from arkor_ray.errors import ArkorError, ServiceUnavailableError, TrainingError
from arkor_ray.storage.retry import RetryPolicy, call_with_retries

logger = logging.getLogger(__name__)

STOP_POLL_SECONDS = 0.5
MAX_BATCH = 200  # reports in one call
UNTIL_CLOSED = RetryPolicy(math.inf, 0.2, 5.0)  # flush() says how long is too long


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
    waits for what was told before it. A call that fails is made again, since the recorder drops what it has already, unless
    what it says is that it will never take this.
    """

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._reports: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue()
        self._checkpoints: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue()
        self._progress = threading.Condition()
        self._told = self._durable = 0  # reports of the first lane: handed to us, and acknowledged
        self._unrecorded: dict[int, dict[str, Any]] = {}  # log entries by their place among the reports, from 1
        self._announcing = 0  # checkpoints not yet acknowledged
        self._refusal: Exception | None = None  # the first one
        self._fault = ""  # why the last call that failed is being made again
        self._stop = threading.Event()
        self._closed = threading.Event()
        for target in (self._send_reports, self._send_checkpoints, self._watch_stop):
            threading.Thread(target=target, name="event-sink", daemon=True).start()

    def started(self, metadata: dict[str, Any]) -> None:
        self._report("started", metadata)

    def log(self, entry: dict[str, Any]) -> None:
        with self._progress:
            self._report("log", entry)
            self._unrecorded[self._told] = entry

    def unrecorded(self) -> list[dict[str, Any]]:
        with self._progress:
            return list(self._unrecorded.values())

    def notice(self, type: str, data: dict[str, Any]) -> None:
        self._report("notice", type, data)

    def stage(self, adapter_id: str, data: bytes) -> None:
        import ray

        # Not waited for: an adapter that was not staged, or whose recorder died, is read from storage.
        try:
            self._recorder.stage.remote(adapter_id, data)
        except ray.exceptions.RayError as error:  # the bytes go through the object store, which may be full
            logger.warning("Adapter %s is not staged: %s", adapter_id, error)

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
                    f"recorder within {timeout:g} s. {self._fault}".rstrip()
                )
            if self._refusal is not None:
                raise TrainingError(f"The job's recorder refused an event: {self._refusal}") from self._refusal

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
                for place in range(self._durable + 1, self._durable + 1 + len(batch)) if recorded else ():
                    self._unrecorded.pop(place, None)
                self._durable += len(batch)
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
        """Its answer, once the recorder has it for good; None if it refused, which flush() raises again, or we are closed."""
        import ray

        def passes(error: Exception) -> bool:
            self._fault = f"It says: {_cause(error)}"
            return not _is_refusal(_cause(error))

        try:
            answer = call_with_retries(
                lambda _failures: ray.get(getattr(self._recorder, method).remote(*args)),
                UNTIL_CLOSED,
                is_transient=passes,
                what=f"The recorder's {method}",
                stop=self._closed,
            )
        except Exception as error:
            logger.error("The recorder did not take %s: %s", method, error)
            self._refusal = self._refusal or _cause(error)
            return None
        self._fault = ""
        return answer

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


def _is_refusal(error: Exception) -> bool:
    """Whether the recorder will say the same next time, because of what it was told. Anything else may pass: a database that
    fails over, a recorder that starts again."""
    from ray.exceptions import RayError

    if isinstance(error, RayError | ServiceUnavailableError):  # some of Ray's are ValueErrors besides
        return False
    return isinstance(error, ArkorError | ValueError | TypeError | LookupError | AttributeError)


def _cause(error: Exception) -> Exception:
    """What the recorder raised; Ray's own error where it raised nothing."""
    from ray.exceptions import RayTaskError

    return error.cause if isinstance(error, RayTaskError) else error
