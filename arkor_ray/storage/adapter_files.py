"""An adapter, wherever it is: a PEFT folder, one in storage, or the final one of a job's output."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from arkor_ray.errors import AdapterError
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.checkpoint import CONFIG_FILE, WEIGHTS_FILE, BasePrecision, CheckpointManifest, ManifestFile
from arkor_ray.storage import layout, locations
from arkor_ray.storage.object_store import ObjectStore, open_store

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_UNKNOWN_JOB = "folder"  # an adapter's id names its job, also where nobody knows of one


@dataclass(frozen=True)
class AdapterFiles:
    """A PEFT folder in memory, by file name; it travels to other nodes as it is.

    `base_model` is the reference of the base it was trained on (see schemas/model.py); `manifest` is there when it came out of
    storage of ours.
    """

    source: str
    files: dict[str, bytes]
    base_model: str
    manifest: CheckpointManifest | None = None

    @property
    def adapter_id(self) -> str:
        return self.manifest.adapter_id if self.manifest else layout.final_adapter_id(_UNKNOWN_JOB)

    @property
    def base_precision(self) -> BasePrecision | None:
        """What the base was held in when this was trained; None when nobody wrote it down."""
        return self.manifest.base_precision if self.manifest else None

    @property
    def has_tokenizer(self) -> bool:
        return all(name in self.files for name in _TOKENIZER)

    @property
    def sha256(self) -> str:
        """Names what the adapter answers with."""
        digest = hashlib.sha256()
        for name in sorted(self.files):
            digest.update(f"{name} {hashlib.sha256(self.files[name]).hexdigest()}\n".encode())
        return digest.hexdigest()

    def write(self, folder: Path) -> Path:
        """As a PEFT folder. Returns `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder

    def commit(self, store: ObjectStore, base_model: str, precision: BasePrecision) -> CheckpointManifest:
        """Puts it into `store` as training would have, for a replica that serves `base_model` in `precision`."""
        config = json.loads(self.files[CONFIG_FILE])
        files = [ManifestFile.of(name, data) for name, data in self.files.items()]
        served = {"base_model": base_model, "base_precision": precision, "files": files}
        manifest = (
            self.manifest.model_copy(update=served)
            if self.manifest
            else CheckpointManifest(
                adapter_id=self.adapter_id,
                job_id=_UNKNOWN_JOB,
                step=0,
                final=True,
                r=config["r"],
                lora_alpha=config["lora_alpha"],
                target_modules=[],
                created_at=utcnow(),
                **served,
            )
        )
        for name, data in self.files.items():
            store.put(layout.adapter_prefix(self.adapter_id) + name, data)
        store.put(layout.manifest_key(self.adapter_id), manifest.to_bytes())
        return manifest


def read_adapter(source: str) -> AdapterFiles:
    """From a folder (a path, file:///… or s3://…) with adapter_config.json, such as `OUTPUT/adapters/<job>-final`, or from a
    job's output, `OUTPUT`, if it has one final adapter.

    Raises AdapterError when there is none, or its bytes are not those that its manifest tells; StorageError.
    """
    url = source if "://" in source else Path(source).expanduser().absolute().as_uri()
    store = open_store(url.rstrip("/"), endpoint_url=locations.endpoint_url())
    if store.head(CONFIG_FILE) is None:
        adapter_id = _final_adapter(store, source)
        url = f"{url.rstrip('/')}/{layout.adapter_prefix(adapter_id).rstrip('/')}"
        store = open_store(url, endpoint_url=locations.endpoint_url())
    names = [info.key for info in store.list("") if "/" not in info.key]
    files = {name: store.get(name) for name in names}
    if WEIGHTS_FILE not in files:
        raise AdapterError(f"{source} has no {WEIGHTS_FILE}; adapters in other forms are not read.")
    stored = files.pop(layout.MANIFEST_NAME, None)
    if stored is not None:
        manifest = CheckpointManifest.from_bytes(stored)
        _verify(source, files, manifest)
        return AdapterFiles(source, files, manifest.base_model, manifest)
    try:
        config = json.loads(files[CONFIG_FILE])
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{source}: {CONFIG_FILE} is none of PEFT: {error!r}") from error
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{source} is a {config.get('peft_type')} adapter; only LORA ones are read.")
    return AdapterFiles(source, files, f"{base}@{revision}" if revision and str(base)[:1] != "/" else str(base))


def _final_adapter(store: ObjectStore, source: str) -> str:
    found = [
        info.key.split("/")[1] for info in store.list("adapters/") if info.key.endswith("/" + layout.MANIFEST_NAME)
    ]
    final = [adapter_id for adapter_id in found if layout.parse_adapter_id(adapter_id)[1] is None]
    if len(final) == 1:
        return final[0]
    if not found:
        raise AdapterError(f"There is no adapter at {source}: neither {CONFIG_FILE} nor a job's adapters/.")
    raise AdapterError(
        f"{source} has {len(final)} final adapters; name one of {', '.join(found)} as {source}/adapters/…"
    )


def _verify(source: str, files: dict[str, bytes], manifest: CheckpointManifest) -> None:
    for file in manifest.files:
        data = files.get(file.path)
        if data is None or not file.is_of(data):
            raise AdapterError(
                f"{source}: {file.path} is {'missing' if data is None else 'not what its manifest tells'}."
            )
