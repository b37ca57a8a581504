"""An adapter's folder on this machine: every file checked against the manifest, whole or not there at all."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType

from arkor_ray.errors import AdapterError, ConflictError
from arkor_ray.schemas.checkpoint import CheckpointManifest, ManifestFile

MANIFEST = "manifest.json"


class FileSink:
    """One file being received."""

    def __init__(self, path: Path, expected: ManifestFile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._expected = expected
        self._hash = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self._file.write(chunk)

    def close(self) -> None:
        self._file.close()

    def verify(self) -> None:
        if self._hash.hexdigest() != self._expected.sha256:
            raise AdapterError(f"{self._expected.path} arrived damaged: its SHA-256 is not the one in the manifest")


class AdapterFolder:
    """`parent/<adapter_id>`, a plain PEFT directory once the `with` block has ended without an error.

    `is_complete` says that this very adapter is there already. Raises ConflictError when something else is.
    """

    def __init__(self, parent: Path | str, manifest: CheckpointManifest) -> None:
        self.path = Path(parent) / manifest.adapter_id
        self.manifest = manifest
        for file in manifest.files:
            _check_inside(file.path)
        _check_inside(manifest.adapter_id)
        self.is_complete = self._is_complete()

    def __enter__(self) -> AdapterFolder:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}."))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                (self._temporary / MANIFEST).write_bytes(self.manifest.to_bytes())
                self._temporary.chmod(0o755)
                self._temporary.rename(self.path)
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    @contextmanager
    def receive(self, file: ManifestFile) -> Iterator[FileSink]:
        sink = FileSink(self._temporary / file.path, file)
        try:
            yield sink
        finally:
            sink.close()
        sink.verify()

    def _is_complete(self) -> bool:
        if not self.path.exists():
            return False
        manifest = self.path / MANIFEST
        if manifest.is_file() and manifest.read_bytes() == self.manifest.to_bytes():
            return True
        raise ConflictError(f"{self.path} exists and is not this adapter; choose another directory")


def _check_inside(path: str) -> None:
    """A manifest comes from the service; it must not be able to write elsewhere on this machine."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or not parts.parts or ".." in parts.parts or "\\" in path:
        raise AdapterError(f"The manifest names a file outside the adapter's folder: {path!r}")
