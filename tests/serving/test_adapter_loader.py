"""Each tier answers when the one above does not, and nothing unverified ever does."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from arkor_ray.errors import AdapterError, NotFoundError, StorageError
from arkor_ray.schemas.checkpoint import CheckpointManifest
from arkor_ray.serving.adapter_loader import AdapterLoader, BaseIdentity, LoaderConfig
from arkor_ray.serving.engine.lora_slots import lora_linears
from arkor_ray.storage import layout
from arkor_ray.storage.local import LocalStore
from tests.serving.tiny import SavedAdapter, commit_adapter, make_adapter

pytestmark = pytest.mark.anyio


class CountingStore(LocalStore):
    """A real store that counts reads and can be told to be down."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()
        self.down = False

    def get(self, key: str) -> bytes:
        self.reads[key.rsplit("/", 1)[-1]] += 1
        if self.down:
            raise StorageError("storage is down")
        return super().get(key)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "store")


@pytest.fixture(scope="module")
def saved(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> SavedAdapter:
    return make_adapter(llama, tmp_path_factory.mktemp("loader") / "a", seed=1)


@pytest.fixture
def manifest(store: CountingStore, saved: SavedAdapter) -> CheckpointManifest:
    return commit_adapter(store, saved, "job", 1, base_model="/models/base")


@pytest.fixture
def loader(store: CountingStore, llama: Any, tmp_path: Path) -> AdapterLoader:
    return make_loader(store, llama, tmp_path)


def make_loader(store: CountingStore, llama: Any, tmp_path: Path, **identity: str) -> AdapterLoader:
    base = BaseIdentity(**({"model": "/models/base", "precision": "fp32"} | identity))
    config = LoaderConfig(tmp_path / "cache")
    return AdapterLoader(store, base, config, linears=lambda: lora_linears(llama), max_rank=64)


WEIGHTS = "adapter_model.safetensors"


async def test_storage_then_ram(loader, store, manifest):
    for _ in range(3):
        weights = await loader.weights("job-step-1")
    assert weights.rank == 8
    assert store.reads[WEIGHTS] == store.reads["manifest.json"] == 1
    assert (loader.counts.storage, loader.counts.ram) == (2, 4)


async def test_disk_survives_a_restart_and_an_outage(loader, store, manifest, llama, tmp_path):
    await loader.weights("job-step-1")
    store.down = True
    after = make_loader(store, llama, tmp_path)
    await after.weights("job-step-1")
    assert (after.counts.disk, after.counts.storage) == (2, 0)


async def test_pushed_bytes_are_not_read_from_storage(loader, store, manifest, saved):
    await loader.admit(manifest, saved.data)
    await loader.admit(manifest, saved.data)
    await loader.weights("job-step-1")
    assert store.reads[WEIGHTS] == 0
    assert store.reads["manifest.json"] == 0


async def test_pushed_bytes_of_something_else_are_refused(loader, manifest, saved):
    with pytest.raises(AdapterError, match="SHA-256"):
        await loader.admit(manifest, saved.data + b"x")


async def test_concurrent_readers_share_one_read(loader, store, manifest):
    await asyncio.gather(*(loader.weights("job-step-1") for _ in range(8)))
    assert store.reads[WEIGHTS] == store.reads["manifest.json"] == 1


async def test_missing_adapter_is_asked_for_anew(loader, store, saved):
    for _ in range(2):
        with pytest.raises(NotFoundError, match="job-step-1"):
            await loader.weights("job-step-1")
    commit_adapter(store, saved, "job", 1, base_model="/models/base")
    assert await loader.weights("job-step-1")


async def test_outage_is_not_a_missing_adapter(loader, store, manifest):
    store.down = True
    with pytest.raises(StorageError):
        await loader.weights("job-step-1")
    store.down = False
    assert await loader.weights("job-step-1")


@pytest.mark.parametrize("name", ["../../etc/passwd", "job", "job-step-x", "job-step-1/..", ""])
async def test_names_that_are_no_ids_are_not_found(loader, name):
    with pytest.raises(NotFoundError):
        await loader.weights(name)


async def test_changed_object_is_refused(loader, store, manifest):
    key = layout.adapter_prefix("job-step-1") + WEIGHTS
    store.put(key, store.get(key)[:-1] + b"\0")
    with pytest.raises(AdapterError, match="SHA-256"):
        await loader.weights("job-step-1")


async def test_damaged_disk_is_read_again(loader, store, manifest, llama, tmp_path):
    await loader.weights("job-step-1")
    (tmp_path / "cache" / "blobs" / manifest.weights.sha256).write_bytes(b"damaged")
    (tmp_path / "cache" / "manifests" / "job-step-1.json").write_bytes(b"{")
    assert await make_loader(store, llama, tmp_path).weights("job-step-1")


@pytest.mark.parametrize("identity", [{"model": "/models/other"}, {"precision": "nf4"}])
async def test_other_base_is_refused(identity, store, manifest, saved, llama, tmp_path):
    other = make_loader(store, llama, tmp_path, **identity)
    with pytest.raises(AdapterError, match="trained on"):
        await other.weights("job-step-1")
    with pytest.raises(AdapterError, match="trained on"):
        await other.admit(manifest, saved.data)


async def test_two_revisions_of_a_base_are_two_bases(store, saved, llama, tmp_path):
    manifest = commit_adapter(store, saved, "job", 1, base_model="a/b@v1")
    for other in ("a/b@v2", "a/b"):
        with pytest.raises(AdapterError, match=r"trained on a/b@v1 \(fp32\)"):
            await make_loader(store, llama, tmp_path, model=other).admit(manifest, saved.data)
    assert await make_loader(store, llama, tmp_path, model="a/b@v1").admit(manifest, saved.data)


async def test_the_commit_that_the_hub_gave_is_no_part_of_what_was_asked_for(store, saved, llama, tmp_path):
    """Manifests of bases without a revision have always had the commit besides."""
    manifest = commit_adapter(store, saved, "job", 1, base_model="a/b").model_copy(update={"base_revision": "9c925d6"})
    assert await make_loader(store, llama, tmp_path, model="a/b").admit(manifest, saved.data)


async def test_second_manifest_under_one_name_is_refused(loader, manifest, saved):
    await loader.admit(manifest, saved.data)
    with pytest.raises(AdapterError, match="another manifest"):
        await loader.admit(manifest.model_copy(update={"step": 2}), saved.data)


async def test_tokenizer_files_are_shared_by_checkpoints(loader, store, manifest, saved, tmp_path):
    commit_adapter(store, saved, "job", 2, base_model="/models/base")
    digests = {await loader.tokenizer_folder(f"job-step-{n}", tmp_path / "tokenizers") for n in (1, 2)}
    assert len(digests) == 1
    assert store.reads["tokenizer.json"] == 1
    folder = tmp_path / "tokenizers" / digests.pop()
    sums = {f.path: f.sha256 for f in manifest.files}
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}.items() <= sums.items()


async def test_adapter_without_tokenizer_is_refused(loader, manifest, saved, tmp_path):
    bare = manifest.model_copy(update={"files": [f for f in manifest.files if f.path.startswith("adapter_")]})
    await loader.admit(bare, saved.data)
    with pytest.raises(AdapterError, match="tokenizer"):
        await loader.tokenizer_folder("job-step-1", tmp_path / "tokenizers")
