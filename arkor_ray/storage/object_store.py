"""The interface of object storage, and how a storage URL becomes a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from arkor_ray.storage.retry import RetryPolicy


@dataclass(frozen=True)
class ObjectInfo:
    """What a store knows about an object without reading it; `size` in bytes, `modified` with its time zone."""

    key: str
    size: int
    modified: datetime


@dataclass(frozen=True)
class Upload:
    """Room that an unfinished write takes; readers do not see it. `key` is "" where a store does not know the object's."""

    key: str
    id: str
    begun: datetime


class ObjectStore(Protocol):
    """Bytes under keys such as `adapters/<id>/manifest.json`. All methods block and may be called from any thread.

    A reader sees a whole object or none: no method leaves a part of one under its key, whatever dies in the middle.
    Faults of the store raise `StorageError`, those of a local file outside it `OSError`, and keys that break the rules
    of `keys.check_key` `ValueError`.
    Stores can be pickled; the copy opens its own connections.
    """

    url: str

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Stores `data`. With `if_absent`, of any number of writers exactly one succeeds; the others get
        `ObjectExistsError`, as does everyone who comes later."""

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        """Stores the content of a local file, large ones in parallel parts; with `if_absent`, in one piece and as `put`."""

    def get(self, key: str) -> bytes:
        """The content; `ObjectNotFoundError` when there is none."""

    def get_file(self, key: str, path: Path) -> None:
        """Writes the content to `path`, whose folder is made; `path` is untouched unless all of it arrived."""

    def head(self, key: str) -> ObjectInfo | None:
        """Size and time of the object, None when there is none."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix` ("" for all), sorted by key."""

    def delete(self, key: str) -> None:
        """Removes the object; nothing happens when there is none."""

    def delete_prefix(self, prefix: str) -> None:
        """Removes every object under `prefix`, which ends with "/", one by one and in no promised order."""

    def delete_all(self, keys: Iterable[str]) -> None:
        """Removes these objects, several at a time and in no promised order."""

    def uploads(self) -> Iterator[Upload]:
        """Every write that was begun and not finished: those under way, and those whose writer died."""

    def abort(self, upload: Upload) -> None:
        """Gives an upload's room back; its writer, if it lives, fails. Nothing happens when it has ended."""

    def now(self) -> datetime:
        """The time by the clock that `ObjectInfo.modified` and `Upload.begun` are of."""


def open_store(url: str, *, endpoint_url: str | None = None, retry: RetryPolicy | None = None) -> ObjectStore:
    """The store behind `file:///absolute/directory` or `s3://bucket/prefix`; opening one makes no request.

    `endpoint_url` is for S3 services other than AWS, `retry` for those who would rather know soon. Raises `ValueError` for
    any other URL, `ImportError` when the package that an S3 store needs is not installed.
    """
    # Taken apart by hand: urlsplit would drop what follows "?" or "#" in a folder's name.
    if url.startswith("file:"):
        from arkor_ray.storage.local import LocalStore

        path = url.removeprefix("file://").removeprefix("localhost")
        if not path.startswith("/"):
            raise ValueError(f"Storage URL {url!r} names no absolute directory. Write file:///absolute/directory.")
        return LocalStore(Path(unquote(path)))
    if url.startswith("s3://"):
        from arkor_ray.storage.s3 import S3Store

        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix, endpoint_url=endpoint_url, retry=retry)
    raise ValueError(
        f"Storage URL {url!r} is of no known kind. Write file:///absolute/directory or s3://bucket/prefix."
    )
