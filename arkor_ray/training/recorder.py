"""The recorder: the actor beside a job's driver that writes the job's events.

Workers tell it what happened with one-way calls. It turns them into numbered events in the database, has serving load each
checkpoint before announcing it, and tells the workers when to stop. It remembers nothing that the database and storage do
not have, and every event has a key; so Ray may restart it and send unfinished calls again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from arkor_ray.db import checkpoints, leases
from arkor_ray.db.session import Database
from arkor_ray.db.tables import JobRow
from arkor_ray.errors import AdapterError, ArkorError, ModelError, ServiceUnavailableError
from arkor_ray.events import publisher
from arkor_ray.events.publisher import NewEvent
from arkor_ray.jobs.artifacts import artifacts
from arkor_ray.jobs.launcher import submission_id
from arkor_ray.placement import NAMESPACE
from arkor_ray.schemas import event
from arkor_ray.schemas.checkpoint import CheckpointManifest
from arkor_ray.schemas.job import JobStatus
from arkor_ray.serving import client as serving
from arkor_ray.settings import Settings
from arkor_ray.telemetry import process, tracing
from arkor_ray.telemetry.metrics import JOB_FAILURES, TRAINING_CHECKPOINT_SECONDS, TRAINING_WORKER_RESTARTS
from arkor_ray.training.job_writer import JobWriter

logger = logging.getLogger(__name__)

STOP_CHECK_S = 0.5  # how stale the answer to `should_stop` may be
SERVED_S = 3600.0  # how long a job whose final adapter is stored waits for serving
STAGED_ADAPTERS = 4  # adapters whose bytes are kept between staging and announcement

T = TypeVar("T")


def actor_name(job_id: str, attempt: int) -> str:
    """One name per attempt, so that a new driver never meets the recorder of a dying one."""
    return f"recorder-{job_id}-{attempt}"


class Recorder:
    """An async actor. Every public method returns once what it was told is durable, or dropped because the job ended.

    Args:
        attempt: events of any other attempt are refused by the database.
    """

    def __init__(self, job_id: str, attempt: int) -> None:
        self._job_id = job_id
        self._attempt = attempt
        self._settings = Settings.load()
        self._db = Database(self._settings.database_url)
        self._writer = JobWriter(self._db)
        self._opened = asyncio.Event()  # training.started is the first event; notices made before it wait for it
        self._announcing = asyncio.Lock()  # FIFO: checkpoints are announced in the order they were committed
        self._staged: dict[str, bytes] = {}
        self._serving_says = ""  # why it cannot load the adapter at hand yet
        self._checked_at = 0.0
        self._starts = 0  # of worker groups that told us

    async def tell(self, reports: list[tuple[str, tuple[Any, ...]]]) -> bool:
        """Several reports of a worker, as (method, arguments): written in their order, in one transaction if they fit.

        False if any was dropped, because the job has ended or a newer attempt runs.
        """
        await asyncio.gather(*(getattr(self, method)(*args) for method, args in reports))
        return not self._writer.ended

    async def beat(self) -> None:
        """The attempt lives: the controller launches another when it no longer hears so."""
        if await self.should_stop():
            return
        name = submission_id(self._job_id, self._attempt)
        await self._write(lambda s: leases.hold(s, name, holder=name, ttl_s=self._settings.job_silence_timeout_s))

    async def started(self, metadata: dict[str, Any]) -> None:
        await self._write(lambda s: publisher.start(s, self._job_id, {"metadata": metadata}, attempt=self._attempt))
        self._opened.set()
        self._starts += 1
        if self._starts > 1:
            model = str(metadata.get("model", ""))
            entry = self._settings.base_models.named(model)
            TRAINING_WORKER_RESTARTS.add(base_model=entry.name if entry is not None else model)

    async def log(self, entry: dict[str, Any]) -> None:
        """A training.log event; `entry` is snake_case with at least `step`. Told again, it is dropped."""
        key, fields = event.log_fields(entry)
        await self._append(NewEvent(event.LOG, key, fields))

    async def notice(self, type: str, data: dict[str, Any]) -> None:
        """An event of our own, such as dataset.preflight or checkpoint.delayed; one per type and step."""
        started = lambda s: publisher.is_recorded(s, self._job_id, "started")  # noqa: E731
        if not self._opened.is_set() and await self._write(started):  # we are a recorder that was restarted
            self._opened.set()
        await self._opened.wait()
        await self._append(NewEvent(type, f"{type}:{data.get('step', '')}", data))

    async def stage(self, adapter_id: str, data: bytes) -> None:
        """Takes the adapter's weights while they are still being uploaded, to hand them on without a read."""
        self._staged[adapter_id] = data
        while len(self._staged) > STAGED_ADAPTERS:
            del self._staged[next(iter(self._staged))]

    async def checkpoint(self, manifest: dict[str, Any]) -> None:
        """A checkpoint was committed: records it, has serving load it, then announces it."""
        found = CheckpointManifest.model_validate(manifest)
        if found.final:  # announced by `completed`; its weights stay staged until then
            return
        key = f"checkpoint:{found.step}"
        async with self._announcing:
            # After a restart every committed checkpoint is told again; those announced need no loading.
            if await self._write(lambda s: publisher.is_recorded(s, self._job_id, key)) is not False:
                return
            began = time.monotonic()
            fields = await self._load(found)
            fields.pop("refused", None)
            await self._write(lambda s: self._announce(s, found, key, fields))
            self._staged.pop(found.adapter_id, None)
            self._tell_announced(found, began)

    async def completed(self, manifest: dict[str, Any], metrics: dict[str, Any]) -> bool:
        """The final adapter is committed: loads it, then ends the job. False if the job had ended before.

        Completed means that the final adapter answers. Serving that is away is waited for, while serving.waiting says why; one
        that refuses the adapter, or is away for SERVED_S, fails the job, whose adapter stays.
        """
        try:
            return await self._complete_once_ready(manifest, metrics)
        finally:
            await asyncio.to_thread(process.end_of_job)  # the driver ends now, and this process with it

    async def failed(self, error: str, step: int | None, preflight: dict[str, Any] | None = None) -> bool:
        """Ends the job with a reason. False if it had ended before.

        `preflight`: what was found in the data, told before the end; as a call of its own it could come too late.
        """
        self._opened.set()
        async with self._announcing:
            ended = bool(
                await self._write(lambda s: self._finish(s, JobStatus.FAILED, event.FAILED, error, step, preflight))
            )
        await asyncio.to_thread(process.end_of_job)
        return ended

    async def should_stop(self) -> bool:
        """True once the job has ended (cancelled, say) or a newer attempt runs."""
        now = asyncio.get_running_loop().time()
        if not self._writer.ended and now - self._checked_at >= STOP_CHECK_S:
            self._checked_at = now
            self._writer.ended = await asyncio.to_thread(self._has_ended)
        return self._writer.ended

    async def _complete_once_ready(self, manifest: dict[str, Any], metrics: dict[str, Any]) -> bool:
        found = CheckpointManifest.model_validate(manifest)
        began = time.monotonic()
        async with self._announcing:
            while not (fields := await self._load(found))["ready"]:
                if await self.should_stop():
                    return False
                refused, waited = fields.pop("refused", False), time.monotonic() - began
                if refused or waited >= SERVED_S:
                    JOB_FAILURES.add(reason=(AdapterError if refused else ServiceUnavailableError).code)
                    return await self._fail_unserved(found, fields["reason"])
                await self._tell_waiting(found, fields["reason"])
            fields |= {"metrics": metrics}
            ended = bool(await self._write(lambda s: self._complete(s, found, fields)))
        self._tell_announced(found, began)
        return ended

    async def _fail_unserved(self, manifest: CheckpointManifest, reason: str) -> bool:
        error = f"The final adapter is stored, but cannot be served: {reason}"
        return bool(await self._write(lambda s: self._finish(s, JobStatus.FAILED, event.FAILED, error, manifest.step)))

    async def _tell_waiting(self, manifest: CheckpointManifest, reason: str) -> None:
        """Once per cause: numbers in it, such as how much is free, change all the time."""
        cause = hashlib.sha256(re.sub(r"[0-9.]+", "", reason).encode()).hexdigest()[:16]
        said = f"Training is done and the final adapter is stored; the job is completed once it answers: {reason}"
        await self._append(
            NewEvent(event.SERVING_WAITING, f"{event.SERVING_WAITING}:{cause}", {"step": manifest.step, "reason": said})
        )

    async def _load(self, manifest: CheckpointManifest) -> dict[str, Any]:
        """Fields of the announcement. Serving gets `checkpoint_ready_timeout_s` to answer with the adapter."""
        await self._write(lambda s: checkpoints.record(s, manifest).adapter_id)
        data = self._staged.get(manifest.adapter_id)
        if data is not None and not manifest.weights.is_of(data):
            data = None  # staged by an attempt that did not get to commit: what counts is in storage
        self._serving_says = ""
        limit = self._settings.checkpoint_ready_timeout_s
        ready, reason, refused, answer = False, "", False, dict[str, Any]()
        try:
            async with asyncio.timeout(limit):
                answer = await self._admit(manifest, data)
                ready = bool(answer)
                reason = "" if ready else "the job has ended"
        except TimeoutError:
            reason = f"serving did not load it within {limit:g} s"
            if self._serving_says:
                reason += f": {self._serving_says}"
            if not manifest.final:
                reason += "; the first request will"
        except (AdapterError, ModelError) as error:
            reason, refused = error.message, True
        if not ready:
            logger.warning("Serving has not loaded adapter %s: %s", manifest.adapter_id, reason)
        return {
            "step": manifest.step,
            "adapterId": manifest.adapter_id,
            "manifestSha256": manifest.sha256,
            "ready": ready,
            **({"reason": reason} if reason else {}),
            **({"refused": True} if refused else {}),
            **({"parity": answer["parity"]} if answer.get("parity") else {}),
        }

    async def _admit(self, manifest: CheckpointManifest, data: bytes | None) -> dict[str, Any]:
        """What serving said, or {} once the job has ended. Tries again until it is cancelled.

        Raises AdapterError or ModelError, which trying again would not mend.
        """
        delay = 0.2
        while not await self.should_stop():
            try:
                return await serving.admit(manifest.model_dump(mode="json"), data)
            except (AdapterError, ModelError):
                raise
            except ArkorError as error:
                logger.warning("Serving cannot load %s yet: %s", manifest.adapter_id, error)
                self._serving_says = error.message
            await asyncio.sleep(delay)
            delay = min(2 * delay, 5.0)
        return {}

    def _tell_announced(self, manifest: CheckpointManifest, began: float) -> None:
        ended = time.monotonic()
        base = self._settings.base_models.of_base(manifest.base_model).name
        TRAINING_CHECKPOINT_SECONDS.observe(ended - began, base_model=base, stage="announce")
        parent = tracing.job_traceparent(self._job_id)
        tracing.record("announce checkpoint", began, ended, parent=parent, arkor__adapter__id=manifest.adapter_id)

    def _announce(self, session: Session, manifest: CheckpointManifest, key: str, fields: dict[str, Any]) -> int | None:
        fields = self._with_artifacts(session, manifest, fields)
        return publisher.append(session, self._job_id, event.CHECKPOINT, fields, key=key, attempt=self._attempt)

    def _complete(self, session: Session, manifest: CheckpointManifest, fields: dict[str, Any]) -> bool:
        fields = self._with_artifacts(session, manifest, fields)
        return publisher.finish(
            session, self._job_id, JobStatus.COMPLETED, type=event.COMPLETED, fields=fields, attempt=self._attempt
        )

    def _with_artifacts(self, session: Session, manifest: CheckpointManifest, fields: dict[str, Any]) -> dict[str, Any]:
        checkpoints.record(session, manifest).ready = fields["ready"]
        listed = artifacts(self._settings.api_url, manifest)
        return {**fields, "artifacts": [artifact.to_wire() for artifact in listed]}

    def _finish(
        self,
        session: Session,
        status: JobStatus,
        type: str,
        error: str,
        step: int | None,
        preflight: dict[str, Any] | None = None,
    ) -> bool:
        if preflight is not None:
            told = NewEvent("dataset.preflight", "dataset.preflight:", preflight)
            publisher.append_all(session, self._job_id, [told], attempt=self._attempt)
        fields = {"error": error, "step": step}
        return publisher.finish(
            session, self._job_id, status, type=type, fields=fields, error=error, attempt=self._attempt
        )

    def _has_ended(self) -> bool:
        try:
            with self._db.read() as session:
                query = select(JobRow.status, JobRow.attempt).where(JobRow.id == self._job_id)
                row = session.execute(query).one_or_none()
        except SQLAlchemyError:
            logger.warning("Could not ask whether the job has ended", exc_info=True)
            return False
        return row is None or JobStatus(row.status).is_terminal or row.attempt != self._attempt

    async def _append(self, new: NewEvent) -> None:
        await self._write(lambda s: publisher.append_all(s, self._job_id, [new], attempt=self._attempt)[0])

    async def _write(self, operation: Callable[[Session], T]) -> T | None:
        return await self._writer.write(operation)


class RecorderActor(Recorder):
    """A Recorder in a process of its own."""

    def __init__(self, job_id: str, attempt: int) -> None:
        process.begin_of_job(job_id, attempt)
        super().__init__(job_id, attempt)


def start_recorder(job_id: str, attempt: int) -> Any:
    """The recorder's actor handle, on this node, restarted by Ray as often as needed, gone with the driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {
        "name": actor_name(job_id, attempt),
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 1000,
        "scheduling_strategy": here,
    }
    return ray.remote(RecorderActor).options(**options).remote(job_id, attempt)
