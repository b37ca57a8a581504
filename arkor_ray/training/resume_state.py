"""Resume states in storage: `state.safetensors` (weights and optimizer) and `state.json`, whose presence completes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch

from arkor_ray.errors import ModelError, ObjectNotFoundError, StorageError
from arkor_ray.schemas.checkpoint import CheckpointManifest
from arkor_ray.storage import layout
from arkor_ray.storage.object_store import ObjectStore
from arkor_ray.training.portable_state import PortableState, Tensors

TENSORS_FILE = "state.safetensors"
INDEX_FILE = layout.RESUME_INDEX_NAME
FORMAT = 1


class DamagedStateError(StorageError):
    """Of this resume state nobody can go on; of an older one perhaps."""


@dataclass
class Progress:
    """Where a run stands after `step` updates, besides weights and optimizer. The data order follows from step and seed.

    `logged_*` is what the next log entry already holds of steps before it, for `logging_steps` above 1;
    `train_seconds` is time spent in all attempts; `unrecorded` are log entries to be told again.
    """

    step: int = 0
    logged_loss: float = 0.0
    logged_tokens: int = 0
    last_loss: float | None = None
    last_eval_loss: float | None = None
    train_seconds: float = 0.0
    unrecorded: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Identity:
    """What must be the same for a state to be continued: another order of data or other weights would be another run."""

    global_batch: int
    samples: int
    seed: int
    optim: str
    shapes: dict[str, list[int]] = field(default_factory=dict)
    base_model: str = ""


def write_resume_state(folder: Path, state: PortableState, progress: Progress, identity: Identity) -> list[Path]:
    """Writes both files and returns them, the index last: upload them in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{kind}/{name}": t.contiguous() for kind, named in state.tensors.items() for name, t in named.items()}
    data = safetensors.torch.save(tensors)
    (folder / TENSORS_FILE).write_bytes(data)
    index = {
        "format": FORMAT,
        "progress": asdict(progress),
        "identity": asdict(identity),
        "optimizer_steps": state.optimizer_steps,
        "loss_scaler": state.loss_scaler,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1))
    return [folder / TENSORS_FILE, folder / INDEX_FILE]


def committed_manifests(store: ObjectStore, job_id: str) -> list[CheckpointManifest]:
    """Of this job's checkpoints, without the final adapter, by step."""
    found = []
    for item in store.list(layout.job_adapters_prefix(job_id) + "step-"):
        if item.key.endswith(f"/{layout.MANIFEST_NAME}"):
            manifest = CheckpointManifest.from_bytes(store.get(item.key))
            if manifest.job_id == job_id:
                found.append(manifest)
    return sorted(found, key=lambda manifest: manifest.step)


def resumable_steps(store: ObjectStore, job_id: str) -> Iterator[int]:
    """The steps of committed checkpoints whose resume state looks whole, newest first. Only reading it tells whether it is."""
    for step, prefix in _states(store, job_id):
        if _is_committed(store, job_id, step) and _read_index(store, prefix) is not None:
            yield step


def load_resume_state(store: ObjectStore, job_id: str, step: int, identity: Identity) -> tuple[PortableState, Progress]:
    """Raises DamagedStateError when it is not whole, StorageError when it was written by a run that this one does not continue,
    ModelError when that is for its base model."""
    prefix = layout.resume_prefix(job_id, step)
    index = _read_index(store, prefix)
    if index is None:
        raise DamagedStateError(f"The resume state {prefix} is gone or not whole.")
    before = {"base_model": identity.base_model, **index["identity"]}  # the first states of this format do not tell it
    if before["base_model"] != identity.base_model:
        raise ModelError(
            f"The job began on base model {before['base_model']}, and the catalogue now has {identity.base_model} for "
            "its name. Put the entry back, or submit the job anew",
            param="config.model",
        )
    if before != asdict(identity):
        different = [key for key, value in asdict(identity).items() if before.get(key) != value]
        raise StorageError(f"The resume state {prefix} is of another run: {', '.join(different)} differ.")
    data = _read_tensors(store, prefix, index)
    tensors: dict[str, Tensors] = {}
    for key, tensor in safetensors.torch.load(data).items():
        kind, _, name = key.partition("/")
        tensors.setdefault(kind, {})[name] = tensor
    return PortableState(tensors, index["optimizer_steps"], index["loss_scaler"]), Progress(**index["progress"])


def is_readable(store: ObjectStore, job_id: str, step: int) -> bool:
    """Whether the resume state is there with the very bytes that its index tells; reads all of it."""
    prefix = layout.resume_prefix(job_id, step)
    index = _read_index(store, prefix)
    try:
        return index is not None and bool(_read_tensors(store, prefix, index))
    except DamagedStateError:
        return False


def prune_resume_states(store: ObjectStore, job_id: str, keep: int) -> None:
    """Deletes the resume states before the newest `keep` of committed checkpoints.

    Of the others, whose checkpoint failed or is still under way, nobody can go on: they count for nothing.
    """
    states = list(_states(store, job_id))
    committed = (step for step, _ in states if _is_committed(store, job_id, step))
    oldest_kept = next(islice(committed, keep - 1, None), 0)
    for step, prefix in states:
        if step < oldest_kept:
            store.delete(prefix + INDEX_FILE)  # first, so that a half-deleted state is not taken for a whole one
            store.delete_prefix(prefix)


def _states(store: ObjectStore, job_id: str) -> Iterator[tuple[int, str]]:
    """Step and prefix of what there is of a job's resume states, whole or not, newest first."""
    folders = {folder for item in store.list(layout.resume_root(job_id)) if (folder := layout.folder_of(item.key))}
    found = [(folder.step, folder.prefix) for folder in folders if folder.step is not None]
    yield from sorted(found, reverse=True)


def _is_committed(store: ObjectStore, job_id: str, step: int) -> bool:
    return store.head(layout.manifest_key(layout.adapter_id(job_id, step))) is not None


def _read_index(store: ObjectStore, prefix: str) -> dict[str, Any] | None:
    try:
        index = json.loads(store.get(prefix + INDEX_FILE))
    except (ObjectNotFoundError, ValueError):
        return None
    tensors = store.head(prefix + TENSORS_FILE)
    whole = index.get("format") == FORMAT and tensors is not None and tensors.size == index["size_bytes"]
    return index if whole else None


def _read_tensors(store: ObjectStore, prefix: str, index: dict[str, Any]) -> bytes:
    try:
        data = store.get(prefix + TENSORS_FILE)
    except ObjectNotFoundError as error:
        raise DamagedStateError(f"{prefix}{TENSORS_FILE} is gone.") from error
    if hashlib.sha256(data).hexdigest() != index["sha256"]:
        raise DamagedStateError(f"{prefix}{TENSORS_FILE} is damaged: its SHA-256 is not that of {INDEX_FILE}.")
    return data
