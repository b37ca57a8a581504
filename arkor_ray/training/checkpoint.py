"""From a snapshot on the host to a committed checkpoint in storage, off the training thread.

A storage fault delays a checkpoint and never ends the job, until several in a row could not be stored.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from arkor_ray.errors import StorageError, TrainingError
from arkor_ray.schemas.checkpoint import BasePrecision, CheckpointManifest, ManifestFile, ParityProbe
from arkor_ray.storage import layout
from arkor_ray.storage.object_store import ObjectStore
from arkor_ray.telemetry import tracing
from arkor_ray.training.adapter_export import AdapterExport
from arkor_ray.training.callbacks import EventSink
from arkor_ray.training.checkpoint_commit import CheckpointCommitter
from arkor_ray.training.figures import TrainingFigures
from arkor_ray.training.loop_config import StoragePatience
from arkor_ray.training.portable_state import PortableState
from arkor_ray.training.resume_state import Identity, Progress, prune_resume_states, write_resume_state
from arkor_ray.training.spool import Spool

logger = logging.getLogger(__name__)

QUEUE_LENGTH = 2
KEPT_RESUME_STATES = 2


@dataclass(frozen=True)
class Snapshot:
    """Training state on the host. With `final`, only the adapter is stored."""

    state: PortableState
    progress: Progress
    metrics: dict[str, float | None]
    probe: ParityProbe | None
    final: bool = False


@dataclass(frozen=True)
class CheckpointContext:
    """What all checkpoints of a run have in common."""

    job_id: str
    base_model: str
    base_revision: str | None
    base_precision: BasePrecision
    identity: Identity
    spool: Spool


class CheckpointWriter:
    """One thread that writes, verifies, uploads and commits snapshots in the order of `submit`. Rank 0 only."""

    def __init__(
        self,
        context: CheckpointContext,
        export: AdapterExport,
        store: ObjectStore,
        sink: EventSink,
        patience: StoragePatience,
        figures: TrainingFigures,
    ) -> None:
        self._context = context
        self._export = export
        self._store = store
        self._sink = sink
        self._patience = patience
        self._figures = figures
        self._queue: queue.Queue[Snapshot | None] = queue.Queue(maxsize=QUEUE_LENGTH)
        self._failures_in_a_row = 0
        self._error: Exception | None = None
        self._closing = threading.Event()
        self._committer = CheckpointCommitter(store, sink, export, patience.per_checkpoint, figures, self._closing)
        self.final_manifest: CheckpointManifest | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error

    def submit(self, snapshot: Snapshot) -> None:
        """Returns at once while fewer than `QUEUE_LENGTH` snapshots wait.

        Otherwise training waits for storage, rather than for memory to run out.
        """
        while not self.failed:
            try:
                return self._queue.put(snapshot, timeout=1.0)
            except queue.Full:
                continue
        self.raise_if_failed()

    def finish(self) -> CheckpointManifest | None:
        """Waits until everything submitted is committed; the final adapter's manifest if there was one.

        Raises TrainingError when storage stayed away or a snapshot did not pass the gate, OSError when the local disk failed.
        """
        self._queue.put(None)
        self._thread.join()
        self.raise_if_failed()
        return self.final_manifest

    def abandon(self) -> None:
        """Stops without waiting for storage to come back; what is on local disk stays there."""
        self._closing.set()
        with suppress(queue.Full):  # then nobody waits for more
            self._queue.put_nowait(None)

    def _run(self) -> None:
        with self._context.spool:
            self._store_all()

    def _store_all(self) -> None:
        while (snapshot := self._queue.get()) is not None and not self._closing.is_set():
            began = time.monotonic()
            try:
                manifest = self._store_snapshot(snapshot)
            except StorageError as error:
                self._figures.checkpoint_ended(committed=False)
                self._count_failure(snapshot, error)
            except Exception as error:  # handed to the training thread, which ends the run with it
                logger.exception("Checkpoint of step %d cannot be made", snapshot.progress.step)
                self._error = (
                    error
                    if isinstance(error, TrainingError | OSError)  # another node, or this one swept, may have room
                    else TrainingError(f"The checkpoint of step {snapshot.progress.step} cannot be made: {error}")
                )
            else:
                self._failures_in_a_row = 0
                self._tell_stored(manifest, began)
                if manifest.final:
                    self.final_manifest = manifest
            if self.failed:
                self._drop_queue()
                return

    def _tell_stored(self, manifest: CheckpointManifest, began: float) -> None:
        ended = time.monotonic()
        logger.info("Adapter %s is stored, after %.1f s", manifest.adapter_id, ended - began)
        self._figures.checkpoint_ended(committed=True)
        self._figures.checkpoint_stage("upload", ended - began)
        parent = tracing.job_traceparent(self._context.job_id)
        tracing.record("store checkpoint", began, ended, parent=parent, arkor__adapter__id=manifest.adapter_id)

    def _store_snapshot(self, snapshot: Snapshot) -> CheckpointManifest:
        context, step = self._context, snapshot.progress.step
        adapter_id = (
            layout.final_adapter_id(context.job_id) if snapshot.final else layout.adapter_id(context.job_id, step)
        )
        folder = context.spool.path / adapter_id
        weights = self._export.weights(snapshot.state.weights, step)
        self._sink.stage(adapter_id, weights)
        prefix = layout.adapter_prefix(adapter_id)
        uploads = [(prefix + path.name, path) for path in self._export.write(folder / "adapter", weights)]
        files = [ManifestFile.of(path.name, path.read_bytes()) for _, path in uploads]
        resume_prefix = None
        if not snapshot.final:
            resume_prefix = layout.resume_prefix(context.job_id, step)
            resume_files = write_resume_state(folder / "resume", snapshot.state, snapshot.progress, context.identity)
            uploads += [(resume_prefix + path.name, path) for path in resume_files]
        manifest = CheckpointManifest(
            adapter_id=adapter_id,
            job_id=context.job_id,
            step=step,
            final=snapshot.final,
            base_model=context.base_model,
            base_revision=context.base_revision,
            base_precision=context.base_precision,
            r=self._export.r,
            lora_alpha=self._export.lora_alpha,
            target_modules=self._export.target_modules,
            template_sha256=self._export.template_sha256,
            metrics=snapshot.metrics,
            files=files,
            resume_prefix=resume_prefix,
            probe=snapshot.probe,
            created_at=datetime.now(UTC),
        )
        committed = self._committer.commit(manifest, uploads)
        self._sink.checkpoint(committed.model_dump(mode="json"))
        shutil.rmtree(folder, ignore_errors=True)
        if not snapshot.final:
            self._prune()
        return committed

    def _count_failure(self, snapshot: Snapshot, error: StorageError) -> None:
        step = snapshot.progress.step
        self._failures_in_a_row += 1
        kept = self._context.spool.path
        self._sink.notice("checkpoint.failed", {"step": step, "reason": str(error), "kept_in": str(kept)})
        if snapshot.final or self._failures_in_a_row >= self._patience.consecutive_failures:
            self._error = TrainingError(
                f"{self._failures_in_a_row} checkpoints in a row could not be stored, the last one of step {step}: {error} "
                f"They are kept in {kept}."
            )

    def _prune(self) -> None:
        try:
            prune_resume_states(self._store, self._context.job_id, KEPT_RESUME_STATES)
        except StorageError as error:
            logger.warning("Old resume states stay for now: %s", error)

    def _drop_queue(self) -> None:
        """Nobody reads the queue any more; a waiting `submit` must see that."""
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                return
