"""Local disk, shared by all replicas of a node: files by the SHA-256 of their content."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from arkor_ray.storage.atomic_file import alone

logger = logging.getLogger(__name__)


class BlobCache:
    """`<root>/blobs/<sha256>` holds exactly the bytes with that hash, or does not exist.

    Writers fill a temporary file and rename it, so a crash leaves nothing that looks whole. When the blobs outgrow
    `max_bytes`, those that were read longest ago are deleted. Methods block and may be called from any thread.
    """

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._blobs = root / "blobs"
        self._locks = root / "locks"
        self._blobs.mkdir(parents=True, exist_ok=True)

    def get(self, sha256: str) -> bytes | None:
        """The bytes, verified; a file that is damaged is deleted and counts as absent."""
        path = self._blobs / sha256
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            logger.warning("Cached file %s is damaged; reading it again from storage.", path)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):  # another replica may make room at this moment
            os.utime(path)
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Keeps bytes whose hash the caller has checked."""
        path = self._blobs / sha256
        if path.exists():
            return
        handle, temporary = tempfile.mkstemp(dir=self._blobs, prefix=".tmp-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._make_room()

    def get_or_fetch(self, sha256: str, fetch: Callable[[], bytes]) -> tuple[bytes, bool]:
        """The bytes and whether they were here; else what `fetch` returns, of which one process per node runs at a time.

        Raises what `fetch` raises; `fetch` must have verified what it returns.
        """
        data = self.get(sha256)
        if data is not None:
            return data, True
        with alone(self._locks / sha256):
            data = self.get(sha256)  # another process may have been first
            if data is not None:
                return data, True
            data = fetch()
            self.put(sha256, data)
            return data, False

    def _make_room(self) -> None:
        files = []
        with os.scandir(self._blobs) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    files.append((status.st_mtime, status.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files)[:-1]:  # the newest stays, however large
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


class RamCache:
    """Read-only bytes by key, least recently used out first when they outgrow `max_bytes`. Safe from any thread."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._items: dict[str, bytes] = {}
        self._size = 0
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        return self._size

    def get(self, key: str) -> bytes | None:
        with self._lock:
            data = self._items.pop(key, None)
            if data is not None:
                self._items[key] = data  # last in, last out
            return data

    def put(self, key: str, data: bytes) -> None:
        """Keeps `data` unless it alone is larger than the cache."""
        with self._lock:
            self._size -= len(self._items.pop(key, b""))
            if len(data) > self.max_bytes:
                return
            self._items[key] = data
            self._size += len(data)
            while self._size > self.max_bytes:
                oldest = next(iter(self._items))
                self._size -= len(self._items.pop(oldest))
