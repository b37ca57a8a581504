"""The attempt's sign of life: from the driver by way of the recorder into the database, so that it proves all three.

Without it nobody would notice a process that hangs, nor a node that only Ray's head does not reach.
"""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

BEAT_S = 3.0
ANSWER_S = 30.0


class Heartbeat:
    """Beats in a thread of its own while it is entered. `recorder`: the actor handle of a recorder.Recorder."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _beat(self) -> None:
        import ray

        while True:
            try:
                ray.get(self._recorder.beat.remote(), timeout=ANSWER_S)
            except ray.exceptions.RayError as error:
                logger.warning("The recorder does not take the sign of life: %s", error)
            if self._ended.wait(BEAT_S):
                return
