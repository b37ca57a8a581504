"""From files on disk to a committed checkpoint in storage, through its faults and beside other attempts at the same.

Order of writing: adapter files and resume state side by side, then the manifest with a conditional put. No manifest,
no checkpoint: a crash between any two lines leaves nothing half-visible.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from arkor_ray.errors import ObjectExistsError, ObjectNotFoundError, StorageError
from arkor_ray.schemas.checkpoint import WEIGHTS_FILE, CheckpointManifest, ManifestFile
from arkor_ray.storage import layout
from arkor_ray.storage.object_store import ObjectStore
from arkor_ray.storage.retry import RetryPolicy
from arkor_ray.training.adapter_export import AdapterExport
from arkor_ray.training.callbacks import EventSink
from arkor_ray.training.figures import TrainingFigures
from arkor_ray.training.resume_state import is_readable

logger = logging.getLogger(__name__)

PARALLEL_UPLOADS = 4


class CheckpointCommitter:
    """Commits the checkpoints of one run, one after the other. Once `closing` is set, nothing is tried again."""

    def __init__(
        self,
        store: ObjectStore,
        sink: EventSink,
        export: AdapterExport,
        patience: RetryPolicy,
        figures: TrainingFigures,
        closing: threading.Event,
    ) -> None:
        self._store = store
        self._sink = sink
        self._export = export
        self._patience = patience
        self._figures = figures
        self._closing = closing

    def commit(self, manifest: CheckpointManifest, uploads: list[tuple[str, Path]]) -> CheckpointManifest:
        """Uploads `uploads`, each a key and its file, and then the manifest. Returns what is committed.

        Another attempt may have been first, or may be at it now: one that was given up, but only stood still. A committed
        adapter is taken as it stands. What fails is tried again; raises the last StorageError when patience ends, and
        TrainingError when weights of another attempt are there that do not pass the gate.
        """
        failures, deadline = 0, None
        remaining, found = dict(uploads), dict[str, bytes]()
        while True:
            try:
                committed = self._committed(manifest.adapter_id)
                if committed is not None:
                    self._renew_resume_state(committed, remaining)
                    return committed
                self._upload_files(remaining, found)
                adopted = self._adopt(manifest, found)
                self._store.put(layout.manifest_key(manifest.adapter_id), adopted.to_bytes(), if_absent=True)
                return adopted
            except ObjectExistsError:
                continue
            except StorageError as error:
                now = time.monotonic()
                failures += 1
                self._figures.storage_failed()
                deadline = deadline or now + self._patience.budget_seconds
                delay = self._patience.delay_seconds(failures)
                logger.warning("Checkpoint %s is delayed: %s", manifest.adapter_id, error)
                if failures == 1:
                    self._sink.notice(
                        "checkpoint.delayed",
                        {"step": manifest.step, "adapter_id": manifest.adapter_id, "reason": str(error)},
                    )
                if now + delay > deadline or self._closing.wait(delay):
                    raise

    def _committed(self, adapter_id: str) -> CheckpointManifest | None:
        try:
            return CheckpointManifest.from_bytes(self._store.get(layout.manifest_key(adapter_id)))
        except ObjectNotFoundError:
            return None

    def _upload_files(self, remaining: dict[str, Path], found: dict[str, bytes]) -> None:
        """Uploads in parallel and takes what arrived out of `remaining`; a resume state's index goes after its tensors.

        What stood already under an adapter's key is put into `found`, by the file's name.
        """
        late = {key: path for key, path in remaining.items() if _is_resume(key) and path.suffix == ".json"}
        for wave in ({k: p for k, p in remaining.items() if k not in late}, late):
            if not wave:
                continue
            with ThreadPoolExecutor(PARALLEL_UPLOADS, thread_name_prefix="checkpoint-upload") as pool:
                futures = {key: pool.submit(self._put_file, key, path) for key, path in wave.items()}
            for key, future in futures.items():
                if future.exception() is None:
                    name = remaining.pop(key).name
                    if (there := future.result()) is not None:
                        found[name] = there
            for future in futures.values():
                future.result()

    def _put_file(self, key: str, path: Path) -> bytes | None:
        """Uploads a file, or returns what stood there already.

        The weights of two attempts differ in their last bits. So each file of an adapter is written once, by who comes
        first: a put of the other that was under way, however late it ends, cannot change what a manifest names. A resume
        state is replaced, as it may be damaged; where two attempts mix theirs its SHA-256 tells, and an older one is taken.
        """
        try:
            self._store.put_file(key, path, if_absent=not _is_resume(key))
        except ObjectExistsError:
            return self._store.get(key)
        return None

    def _adopt(self, manifest: CheckpointManifest, found: dict[str, bytes]) -> CheckpointManifest:
        """The manifest of what is in storage: with the files `found` there, put by an attempt that did not get to commit.

        Raises TrainingError when its weights do not pass the gate.
        """
        ours = {file.path: file for file in manifest.files}
        theirs = {name: data for name, data in found.items() if not ours[name].is_of(data)}
        if not theirs:  # or only the answer to a put of ours was lost
            return manifest
        logger.info("Adapter %s takes %s of an earlier attempt", manifest.adapter_id, ", ".join(sorted(theirs)))
        probe, weights = manifest.probe, theirs.get(WEIGHTS_FILE)
        if weights is not None:
            self._export.check(weights, manifest.step)
            self._sink.stage(manifest.adapter_id, weights)
            probe = None  # what our model says is not exactly what this adapter will
        files = [ManifestFile.of(name, theirs[name]) if name in theirs else file for name, file in ours.items()]
        return manifest.model_copy(update={"files": files, "probe": probe})

    def _renew_resume_state(self, committed: CheckpointManifest, remaining: dict[str, Path]) -> None:
        """Who comes by a committed checkpoint again went on from an older one, perhaps because nobody can go on from this one.
        Then the state at hand takes its place, or the next death would cost these steps again."""
        files = {key: path for key, path in remaining.items() if _is_resume(key)}
        if files and not is_readable(self._store, committed.job_id, committed.step):
            self._upload_files(files, {})


def _is_resume(key: str) -> bool:
    folder = layout.folder_of(key)
    return folder is not None and folder.kind is layout.Kind.RESUME
