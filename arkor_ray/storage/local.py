"""Objects as files below one directory: the embedded default."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from arkor_ray.errors import ObjectExistsError, ObjectNotFoundError, StorageError
from arkor_ray.storage.atomic_file import replacing, sync
from arkor_ray.storage.keys import check_folder, check_key, check_prefix
from arkor_ray.storage.object_store import ObjectInfo, Upload

# Objects are written here and then moved to their key; keys cannot begin with a dot.
_INCOMING = ".incoming"
# A writer that was killed leaves its file there. No write takes as long as this, so nobody else's is removed.
_LEFTOVER_SECONDS = 24 * 3600


class LocalStore:
    """An `ObjectStore` in a directory, which is made when the first object comes.

    Safe for any number of threads and processes of one machine. The file system must know hard links: a link is the one
    operation that both publishes a whole file and fails when the name is taken.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.url = self.root.as_uri()

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        with self._errors("put", key), self._incoming() as temporary:
            temporary.write_bytes(data)
            self._publish(temporary, self._path(key), if_absent)

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        with path.open("rb") as source, self._errors("put", key), self._incoming() as temporary:
            with temporary.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            self._publish(temporary, self._path(key), if_absent)

    def get(self, key: str) -> bytes:
        with self._errors("get", key, missing_is_not_found=True):
            return self._path(key).read_bytes()

    def get_file(self, key: str, path: Path) -> None:
        with self._errors("get", key, missing_is_not_found=True):
            source = self._path(key).open("rb")
        with source, replacing(path) as temporary, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)

    def head(self, key: str) -> ObjectInfo | None:
        with self._errors("head", key):
            return self._info(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._errors("list", prefix):
            keys = sorted(key for key in self._keys_below(prefix.rpartition("/")[0]) if key.startswith(prefix))
        for key in keys:
            with self._errors("list", prefix):
                info = self._info(key)
            if info is not None:  # else deleted since
                yield info

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._errors("delete", key):
            if self._info(key) is None:  # nothing, or a folder of other objects
                return
            path.unlink(missing_ok=True)
            self._remove_empty_folders(path.parent)

    def delete_prefix(self, prefix: str) -> None:
        check_folder(prefix)
        self.delete_all([info.key for info in self.list(prefix)])

    def delete_all(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.delete(key)

    def uploads(self) -> Iterator[Upload]:
        with self._errors("list", _INCOMING):
            found = sorted((self.root / _INCOMING).glob("*"))
        for path in found:
            with suppress(FileNotFoundError), self._errors("list", _INCOMING):  # published, or given up
                yield Upload("", path.name, datetime.fromtimestamp(path.stat().st_mtime, UTC))

    def abort(self, upload: Upload) -> None:
        with self._errors("delete", _INCOMING):
            (self.root / _INCOMING / Path(upload.id).name).unlink(missing_ok=True)

    def now(self) -> datetime:
        return datetime.now(UTC)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _info(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            stat = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if path.is_dir():
            return None
        return ObjectInfo(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    def _keys_below(self, folder: str) -> Iterator[str]:
        for directory, folders, files in os.walk(self.root / folder, onerror=_raise_unless_missing):
            folders[:] = [name for name in folders if not name.startswith(".")]
            base = Path(directory).relative_to(self.root)
            yield from ((base / name).as_posix() for name in files if not name.startswith("."))

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        folder = self.root / _INCOMING
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary = folder / uuid.uuid4().hex
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _publish(self, temporary: Path, path: Path, if_absent: bool) -> None:
        sync(temporary)
        for last_try in (False, False, False, True):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                if if_absent:
                    os.link(temporary, path)
                else:
                    temporary.replace(path)
                break
            except FileExistsError as error:
                raise ObjectExistsError(f"There is already an object {path.as_uri()}.") from error
            except FileNotFoundError:  # a delete elsewhere took the empty folder between the two calls
                if last_try:
                    raise
        sync(path.parent)

    def _remove_empty_folders(self, folder: Path) -> None:
        while folder != self.root:
            try:
                folder.rmdir()
            except OSError:  # not empty, or gone already
                return
            folder = folder.parent

    @contextmanager
    def _errors(self, action: str, key: str, *, missing_is_not_found: bool = False) -> Iterator[None]:
        where = f"{key!r} in {self.url}"
        try:
            yield
        except OSError as error:
            if missing_is_not_found and isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
                raise ObjectNotFoundError(f"There is no object {where}.") from error
            reason = f"{type(error).__name__}: {error.strerror or error}"
            raise StorageError(f"Storage could not {action} {where}: {reason}.") from error


def _remove_leftovers(folder: Path) -> None:
    oldest = time.time() - _LEFTOVER_SECONDS
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process came first
            if path.stat().st_mtime < oldest:
                path.unlink()


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
