"""What a driver prints, and its workers by way of it, kept in storage: Ray's own file goes with its node."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import TracebackType

from arkor_ray.errors import StorageError
from arkor_ray.printed import KEPT_BYTES, newest
from arkor_ray.storage.object_store import ObjectStore

logger = logging.getLogger(__name__)

PERIOD_S = 30.0


class DriverLog:
    """While it is open, the file that standard output goes to is copied to `key` when it has grown, and at the end.

    Does nothing where standard output is no file, as when a driver is run by hand.
    """

    def __init__(self, store: ObjectStore, key: str, path: Path | None = None) -> None:
        self._store = store
        self._key = key
        self._path = path or _stdout_file()
        self._copied = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="driver-log", daemon=True)

    def __enter__(self) -> DriverLog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        self._copy()

    def _run(self) -> None:
        while not self._closing.wait(PERIOD_S):
            self._copy()

    def _copy(self) -> None:
        if self._path is None or (size := self._path.stat().st_size) == self._copied:
            return
        left_out = max(0, size - KEPT_BYTES)
        with self._path.open("rb") as file:
            file.seek(left_out)
            data = file.read(size - left_out)
        try:
            self._store.put(self._key, newest(data, before=left_out))
        except StorageError as error:
            logger.warning("The log was not copied to storage: %s", error)
        self._copied = size


def _stdout_file() -> Path | None:
    try:
        path = Path("/proc/self/fd/1").readlink()
    except OSError:  # no such thing on this system
        return None
    return path if path.is_file() else None
