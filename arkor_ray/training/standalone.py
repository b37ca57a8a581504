"""A job without the service: the same driver and the same workers, told about in the terminal and not in a database.

What the service's database does for a job, the output folder does here: its adapters, resume states and rows lie there as
the service would store them, and beside them what the job was asked for. So a job with the same id and output goes on from
its newest checkpoint, and one that asks for something else is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from arkor_ray.errors import ConflictError, InvalidRequestError, ObjectExistsError
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.checkpoint import CheckpointManifest
from arkor_ray.schemas.event import CHECKPOINT, COMPLETED, FAILED, LOG, STARTED, Event, event_data, log_fields
from arkor_ray.settings import Settings
from arkor_ray.storage import layout, locations
from arkor_ray.storage.object_store import open_store
from arkor_ray.training.job_spec import JobSpec
from arkor_ray.training.main import make_spec
from arkor_ray.training.trainer import run_job

# What may differ from one start of a job to the next; of the three numbers that make the global batch, only it must not.
_FREE = {
    "num_workers",
    "batch_size",
    "gradient_accumulation_steps",
    "zero_stage",
    "logging_steps",
    "save_steps",
    "gpu_types",
}


NAMESPACE = "arkor-standalone"


def job_id_of(name: str) -> str:
    """The id of a job that was given none: its name, as far as keys may have it."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:100] or "job"


def standalone_spec(job_id: str, config: dict[str, Any], output: str) -> JobSpec:
    """The job of a wire's `config`, with `output` for its storage: an absolute path, file:///… or s3://bucket/prefix.

    Its model is a name of the catalogue (ARKOR_RAY_CATALOGUE, ARKOR_RAY_MODELS), or itself a Hub id, an absolute directory
    or s3://bucket/prefix. Data sets may be files of this machine and at private addresses: who may start Ray jobs can read
    these anyway. Raises InvalidRequestError.
    """
    storage_url = locations.folder_url(output, param="--output")
    try:
        layout.job_config_key(job_id)
    except ValueError as error:
        raise InvalidRequestError(f"--job-id: {error}", param="--job-id") from error
    # A service's settings may be around; which database it has does not matter here.
    own: dict[str, Any] = {"cluster": False, "storage_url": storage_url, "s3_endpoint_url": None}
    settings, model = Settings.load(**own), str(config["model"])
    if settings.base_models.named(model) is None:
        settings = Settings.load(**own, models={**settings.models, model: model})
    spec = make_spec(job_id, 1, config, None, settings)
    policy = replace(spec.dataset_policy, allow_private_hosts=True, allow_local_paths=True)
    return replace(spec, dataset_policy=policy, s3_endpoint_url=locations.endpoint_url())


def run_standalone(spec: JobSpec, on_event: Callable[[Event], None]) -> bool:
    """Runs the job, or the rest of it, on the Ray that this process is connected to. True when it completed.

    `on_event` is called in a thread with each event, as the service would have sent it, in order and before this returns.
    Raises InvalidRequestError when the output has another job under this id or is not there for all nodes, ConflictError
    while the same job runs, and what `run_job` raises when the attempt was lost: started again, the job goes on from its
    newest checkpoint.
    """
    check_shared(spec.storage_url)
    log = _start_log(spec)
    follower = _Follower(log, on_event)
    follower.start()
    try:
        check_same_job(spec)
        run_job(spec, log)
    finally:
        ray.get(log.close.remote())
        follower.join()
        ray.kill(log)
    if follower.error is not None:
        raise follower.error
    return follower.last_type == COMPLETED


def check_same_job(spec: JobSpec) -> None:
    """Raises InvalidRequestError when the output's job of this id was asked for something else, and has checkpoints of that."""
    store, key = spec.open_store(), layout.job_config_key(spec.job_id)
    mine = _lasting(spec)
    try:
        store.put(key, json.dumps(mine, indent=1).encode(), if_absent=True)
    except ObjectExistsError:
        before = json.loads(store.get(key))
        changed = [_difference(name, mine[name], before.get(name)) for name in mine if mine[name] != before.get(name)]
        if not changed:
            return
        if any(store.list(layout.job_adapters_prefix(spec.job_id) + "step-")):
            raise InvalidRequestError(
                f"--job-id {spec.job_id}: {spec.storage_url} has checkpoints of this job, begun with other values: "
                f"{'; '.join(changed)}. Put them back to go on with it, or give the new job a --job-id of its own",
                param="--job-id",
            ) from None
        store.delete_prefix(layout.dataset_prefix(spec.job_id))  # perhaps of another data set
        store.put(key, json.dumps(mine, indent=1).encode())


def check_shared(storage_url: str) -> None:
    """Raises InvalidRequestError when the storage is a directory that some node does not have.

    Told by a file that is written here and looked for on every node.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if not storage_url.startswith("file:") or len(nodes) < 2:
        return
    store, key = open_store(storage_url), layout.shared_probe_key(uuid.uuid4().hex)
    store.put(key, b"")
    try:
        asked = [
            _has.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(storage_url, key)
            for node in nodes
        ]
        blind = [address for address, sees in zip(nodes.values(), ray.get(asked), strict=True) if not sees]
    finally:
        store.delete(key)
    if blind:
        raise InvalidRequestError(
            f"--output {storage_url} is not shared: {', '.join(blind)} cannot see what is written there. Use s3://…, "
            "or a directory that every node mounts",
            param="--output",
        )


class EventLog:
    """An async actor: to the workers what `recorder.Recorder` is, to the driver a list of events that grows.

    It remembers what it was told for as long as it lives, which is as long as its driver.
    """

    def __init__(self, job_id: str, storage_url: str) -> None:
        self._job_id, self._storage_url = job_id, storage_url
        self._events: list[Event] = []
        self._keys: set[str] = set()
        self._closed = False
        self._changed = asyncio.Condition()

    async def after(self, id: int) -> tuple[list[Event], bool]:
        """Events with higher numbers, as soon as there are any, and whether none will follow."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or len(self._events) > id)
            return self._events[id:], self._closed

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def tell(self, reports: list[tuple[str, tuple[Any, ...]]]) -> bool:
        for method, args in reports:
            await getattr(self, method)(*args)
        return True

    async def started(self, metadata: dict[str, Any]) -> None:
        await self._append(STARTED, "started", {"metadata": metadata})

    async def log(self, entry: dict[str, Any]) -> None:
        key, fields = log_fields(entry)
        await self._append(LOG, key, fields)

    async def notice(self, type: str, data: dict[str, Any]) -> None:
        await self._append(type, f"{type}:{data.get('step', '')}", data)

    async def stage(self, adapter_id: str, data: bytes) -> None:
        """Nothing serves it."""

    async def checkpoint(self, manifest: dict[str, Any]) -> None:
        found = CheckpointManifest.model_validate(manifest)
        if not found.final:  # told by `completed`
            await self._append(CHECKPOINT, f"checkpoint:{found.step}", self._where(found))

    async def completed(self, manifest: dict[str, Any], metrics: dict[str, Any]) -> None:
        found = CheckpointManifest.model_validate(manifest)
        await self._append(COMPLETED, "ended", {**self._where(found), "metrics": metrics})

    async def failed(self, error: str, step: int | None, preflight: dict[str, Any] | None = None) -> None:
        if preflight is not None:
            await self.notice("dataset.preflight", preflight)
        await self._append(FAILED, "ended", {"error": error, "step": step})

    async def should_stop(self) -> bool:
        return False

    def _where(self, manifest: CheckpointManifest) -> dict[str, Any]:
        prefix = layout.adapter_prefix(manifest.adapter_id)
        return {
            "step": manifest.step,
            "adapterId": manifest.adapter_id,
            "manifestSha256": manifest.sha256,
            "url": f"{self._storage_url}/{prefix}".rstrip("/"),
        }

    async def _append(self, type: str, key: str, fields: dict[str, Any]) -> None:
        """Once for each key: after a restart of the workers everything may be told again."""
        if key in self._keys:
            return
        self._keys.add(key)
        async with self._changed:
            number = len(self._events) + 1
            self._events.append(Event(id=number, type=type, data=event_data(type, self._job_id, utcnow(), fields)))
            self._changed.notify_all()


def _start_log(spec: JobSpec) -> Any:
    """The job's EventLog on this node. Its name is the lock on the job: two drivers would write the same checkpoints."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": f"{spec.storage_url} {spec.job_id}", "namespace": NAMESPACE, "num_cpus": 0}
    log: Any = ray.remote(EventLog)
    try:
        return log.options(scheduling_strategy=here, **options).remote(spec.job_id, spec.storage_url)
    except ValueError as error:
        raise ConflictError(
            f"Job {spec.job_id} in {spec.storage_url} is running on this cluster; wait for it, or end it with `ray job stop`."
        ) from error


class _Follower(threading.Thread):
    """Hands on the events while the main thread, which Ray Train wants for itself, trains."""

    def __init__(self, log: Any, on_event: Callable[[Event], None]) -> None:
        super().__init__(name="event-follower", daemon=True)
        self._log, self._on_event = log, on_event
        self.last_type = ""
        self.error: Exception | None = None

    def run(self) -> None:
        seen, closed = 0, False
        try:
            while not closed:
                events, closed = ray.get(self._log.after.remote(seen))
                for event in events:
                    seen, self.last_type = event.id, event.type
                    self._on_event(event)
        except Exception as error:  # raised again in the main thread
            self.error = error


@ray.remote(num_cpus=0)
def _has(storage_url: str, key: str) -> bool:
    return open_store(storage_url).head(key) is not None


def _lasting(spec: JobSpec) -> dict[str, Any]:
    """What makes the job this job, as plain JSON."""
    config = spec.config
    kept = config.model_dump(mode="json", exclude=_FREE)
    kept["dataset_source"].pop("token", None)
    if (url := urlsplit(kept["dataset_source"].get("url", ""))).scheme == "file":
        kept["dataset_source"] = {"type": "file", "sha256": _sha256(Path(unquote(url.path)))}
    batch = config.batch_size * config.gradient_accumulation_steps * config.num_workers
    return {**kept, "global_batch": batch, "base_model": spec.base_model}


def _difference(name: str, now: Any, before: Any) -> str:
    if name == "dataset_source" and now["type"] == "file" and before.get("type") == "file":
        return (
            f"the data set's file has other contents (SHA-256 is {now['sha256'][:12]}…, was {before['sha256'][:12]}…)"
        )
    return f"{name} is {now!r}, was {before!r}"


def _sha256(path: Path) -> str:
    """What tells a local data set from another; its place does not, as each Ray job has its own copy of the working directory.

    Raises InvalidRequestError when the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidRequestError(
            f"dataset: {path} cannot be read: {error.strerror or error}", param="dataset"
        ) from error
