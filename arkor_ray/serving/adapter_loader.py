"""Finds an adapter by its id, in host memory, on local disk or in object storage, and verifies what it finds.

| tier | holds                                   | on a miss                       |
| ---- | --------------------------------------- | ------------------------------- |
| T0   | weights in device slots (the engine)    | asks here, `weights`            |
| T1   | verified files in host memory           | reads T2                        |
| T2   | files on local disk, by their SHA-256   | reads T3, one process per node  |
| T3   | `adapters/<id>/` in object storage      | NotFoundError                   |

An adapter id is never used twice, so nothing here is ever refreshed. Whatever a file is read from, its SHA-256 must be the
one in the manifest. A failure is told to those who waited for it and remembered by nobody.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from arkor_ray.errors import AdapterError, NotFoundError, ObjectNotFoundError
from arkor_ray.schemas.checkpoint import CONFIG_FILE, CheckpointManifest, ManifestFile
from arkor_ray.serving.blob_cache import BlobCache, RamCache
from arkor_ray.serving.single_flight import SingleFlight
from arkor_ray.storage import layout
from arkor_ray.storage.object_store import ObjectStore
from arkor_ray.telemetry import tracing

if TYPE_CHECKING:
    from arkor_ray.serving.engine.lora_weights import LoraWeights

logger = logging.getLogger(__name__)

T = TypeVar("T")
Tier = Literal["ram", "disk", "storage", "pushed"]

_TOKENIZER_FILES = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
}  # fmt: skip
_TIER_NAMES = {"ram": "host", "disk": "disk", "storage": "store", "pushed": "host"}  # as metrics and traces call them
_MANIFESTS = 4096
_READERS = 8


@dataclass
class TierCounts:
    """Files answered by each tier since the start."""

    ram: int = 0
    disk: int = 0
    storage: int = 0
    pushed: int = 0


@dataclass(frozen=True)
class BaseIdentity:
    """The base model that adapters here must have been trained on."""

    model: str
    precision: str


@dataclass(frozen=True)
class LoaderConfig:
    """Sizes in bytes."""

    cache_dir: Path
    disk_bytes: int = 20 * 2**30
    ram_bytes: int = 2 * 2**30


class AdapterLoader:
    """One per replica. Coroutines may be called from its event loop only; reading happens in its threads.

    `linears` and `max_rank` are what the engine can take (see `parse_adapter`). `found` is told where an adapter's weights were
    (host, disk, store), and after how many seconds they were ready.
    """

    def __init__(
        self, store: ObjectStore, base: BaseIdentity, config: LoaderConfig,
        *, linears: Callable[[], Mapping[str, tuple[int, int]]], max_rank: int,
        found: Callable[[str, float], None] = lambda tier, seconds: None,
    ) -> None:  # fmt: skip
        self._store = store
        self._base = base
        self._linears = linears
        self._max_rank = max_rank
        self._found = found
        self._disk = BlobCache(config.cache_dir, max_bytes=config.disk_bytes)
        self._ram = RamCache(config.ram_bytes)
        self._manifests: OrderedDict[str, CheckpointManifest] = OrderedDict()
        self._manifest_dir = config.cache_dir / "manifests"
        self._manifest_dir.mkdir(parents=True, exist_ok=True)
        self._flights: SingleFlight[Any] = SingleFlight()
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="adapter-loader")
        self._counts_lock = threading.Lock()
        self.counts = TierCounts()

    async def manifest(self, adapter_id: str) -> CheckpointManifest:
        """The adapter's manifest. NotFoundError when there is none, which is asked anew each time."""
        known = self._manifests.get(adapter_id)
        if known is not None:
            self._manifests.move_to_end(adapter_id)
            return known
        read = partial(self._read_manifest, adapter_id)
        manifest = await self._flights.run(f"manifest {adapter_id}", lambda: self._in_thread(read))
        return self._remember(manifest)

    async def weights(self, adapter_id: str) -> LoraWeights:
        """Verified weights, ready for a slot (`AdapterSource` of the engine)."""
        manifest = await self.manifest(adapter_id)

        async def load() -> LoraWeights:
            began = time.monotonic()
            with tracing.span("load adapter", arkor__adapter__id=adapter_id) as span:
                weights, tier = await self._in_thread(partial(self._load, manifest))
                span.set(arkor__adapter__tier=tier)
            self._found(tier, time.monotonic() - began)
            return weights

        return await self._flights.run(f"weights {adapter_id}", load)

    async def admit(self, manifest: CheckpointManifest, data: bytes | None) -> LoraWeights:
        """Weights of an adapter that training has just finished; with `data`, without reading them from storage.

        Raises AdapterError when the bytes are not the manifest's, or do not pass the strict loader.
        """
        self._check(manifest)
        if data is not None:
            await self._in_thread(partial(self._keep_pushed, manifest, data))
        self._remember(manifest)
        return await self.weights(manifest.adapter_id)

    async def tokenizer_folder(self, adapter_id: str, into: Path) -> str:
        """Writes the adapter's tokenizer files to the folder `into/<hash>` unless it is there; returns the hash.

        Adapters of one job have the same files, hence the same hash.
        """
        manifest = await self.manifest(adapter_id)
        files = sorted((f for f in manifest.files if f.path in _TOKENIZER_FILES), key=lambda f: f.path)
        if not files:
            raise AdapterError(f"Adapter {adapter_id} has no tokenizer files, so its prompts cannot be built.")
        digest = hashlib.sha256("\n".join(f"{f.path} {f.sha256}" for f in files).encode()).hexdigest()

        async def write() -> None:
            await self._in_thread(partial(self._write_folder, manifest, files, into / digest))

        if not (into / digest).is_dir():
            await self._flights.run(f"tokenizer {digest}", write)
        return digest

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    # In the loader's threads.

    def _load(self, manifest: CheckpointManifest) -> tuple[LoraWeights, str]:
        """The weights, and the name of the tier that had them."""
        from arkor_ray.serving.engine.lora_weights import parse_adapter

        config, _ = self._read(manifest, manifest.file(CONFIG_FILE))
        try:
            options = json.loads(config)
        except ValueError as error:
            raise AdapterError(f"Adapter {manifest.adapter_id}: {CONFIG_FILE} is not JSON: {error}") from error
        data, tier = self._read(manifest, manifest.weights)
        weights = parse_adapter(manifest.adapter_id, data, options, self._linears(), max_rank=self._max_rank)
        return weights, _TIER_NAMES[tier]

    def _read(self, manifest: CheckpointManifest, file: ManifestFile) -> tuple[bytes, Tier]:
        data = self._ram.get(file.sha256)
        if data is not None:
            self._count("ram")
            return data, "ram"
        data, was_here = self._disk.get_or_fetch(file.sha256, lambda: self._fetch(manifest, file))
        tier: Tier = "disk" if was_here else "storage"
        self._count(tier)
        self._ram.put(file.sha256, data)
        return data, tier

    def _fetch(self, manifest: CheckpointManifest, file: ManifestFile) -> bytes:
        key = layout.adapter_prefix(manifest.adapter_id) + file.path
        try:
            data = self._store.get(key)
        except ObjectNotFoundError as error:
            raise NotFoundError(f"Adapter {manifest.adapter_id}: {key} is gone from storage.") from error
        _verify(manifest, file, data)
        return data

    def _keep_pushed(self, manifest: CheckpointManifest, data: bytes) -> None:
        _verify(manifest, manifest.weights, data)
        self._count("pushed")
        self._ram.put(manifest.weights.sha256, data)
        # The disk is for later, after a restart; the first token must not wait for it.
        self._threads.submit(self._disk.put, manifest.weights.sha256, data).add_done_callback(_log_failure)

    def _read_manifest(self, adapter_id: str) -> CheckpointManifest:
        try:
            key = layout.manifest_key(adapter_id)
        except ValueError as error:
            raise NotFoundError(str(error)) from error
        local = self._manifest_dir / f"{adapter_id}.json"
        if local.is_file():
            try:
                return self._parse_manifest(adapter_id, local.read_bytes())
            except AdapterError:
                logger.warning("Cached manifest %s is damaged; reading it again from storage.", local)
        try:
            data = self._store.get(key)
        except ObjectNotFoundError as error:
            raise NotFoundError(f"There is no adapter {adapter_id}.") from error
        manifest = self._parse_manifest(adapter_id, data)
        with tempfile.NamedTemporaryFile(dir=self._manifest_dir, delete=False) as temporary:
            temporary.write(data)
        Path(temporary.name).replace(local)
        return manifest

    def _parse_manifest(self, adapter_id: str, data: bytes) -> CheckpointManifest:
        manifest = CheckpointManifest.from_bytes(data)
        if manifest.adapter_id != adapter_id:
            raise AdapterError(f"The manifest of {adapter_id} is that of {manifest.adapter_id}.")
        self._check(manifest)
        return manifest

    def _write_folder(self, manifest: CheckpointManifest, files: list[ManifestFile], folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-"))
        try:
            for file in files:
                (temporary / file.path).write_bytes(self._read(manifest, file)[0])
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same files
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    # Small things.

    def _check(self, manifest: CheckpointManifest) -> None:
        mine, theirs = self._base, BaseIdentity(manifest.base_model, manifest.base_precision)
        if mine != theirs:
            raise AdapterError(
                f"Adapter {manifest.adapter_id} was trained on {theirs.model} ({theirs.precision}); "
                f"this replica serves {mine.model} ({mine.precision})."
            )

    def _remember(self, manifest: CheckpointManifest) -> CheckpointManifest:
        known = self._manifests.setdefault(manifest.adapter_id, manifest)
        if known.sha256 != manifest.sha256:
            raise AdapterError(f"Adapter {manifest.adapter_id} is known already, with another manifest.")
        while len(self._manifests) > _MANIFESTS:
            self._manifests.popitem(last=False)
        return known

    def _count(self, tier: Tier) -> None:
        with self._counts_lock:
            setattr(self.counts, tier, getattr(self.counts, tier) + 1)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _verify(manifest: CheckpointManifest, file: ManifestFile, data: bytes) -> None:
    if not file.is_of(data):
        raise AdapterError(f"Adapter {manifest.adapter_id}: {file.path} has not the SHA-256 that its manifest tells.")


def _log_failure(done: Any) -> None:
    if not done.cancelled() and done.exception() is not None:
        logger.warning("A pushed adapter could not be kept on disk: %s", done.exception())
