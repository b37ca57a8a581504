"""Collecting garbage in storage: walks every key once, asks the database about the jobs, removes what `retention` lets go.

The file of a folder that was written last goes first, and an adapter's row before that; so a death between any two
deletions leaves nothing that looks whole, and the next collection takes the rest. Keys that the service did not make are
told and never removed. So are folders of jobs that the database lacks, unless that is asked for: a database restored from a
backup, or that of another service, lacks jobs too.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import groupby, islice

from arkor_ray.db import checkpoints, jobs, leases
from arkor_ray.db.session import Database
from arkor_ray.errors import ConflictError, StorageError
from arkor_ray.jobs import retention
from arkor_ray.jobs.retention import Facts, Garbage, Limits
from arkor_ray.settings import Settings
from arkor_ray.storage import ObjectInfo, ObjectStore, layout
from arkor_ray.storage.keys import check_key
from arkor_ray.storage.layout import Folder, Kind

logger = logging.getLogger(__name__)

LEASE = "storage-gc"
LEASE_S = 600.0  # renewed with every batch
FOLDERS_AT_A_TIME = 200  # one question to the database, and what is in memory
EXAMPLES = 5


@dataclass
class Amount:
    """How much: `size` in bytes, 0 for uploads, whose size a store does not tell."""

    objects: int = 0
    size: int = 0
    oldest: datetime | None = None

    def add(self, size: int, modified: datetime) -> None:
        self.objects += 1
        self.size += size
        self.oldest = modified if self.oldest is None else min(self.oldest, modified)


@dataclass
class Report:
    """What went, or would go, and what was left alone for want of an owner."""

    dry_run: bool
    removed: dict[Garbage, Amount] = field(default_factory=dict)
    unknown_jobs: Amount = field(default_factory=Amount)
    unknown_keys: Amount = field(default_factory=Amount)
    examples: list[str] = field(default_factory=list)  # of unknown keys
    known_folders: int = 0
    problems: list[str] = field(default_factory=list)  # why it ended early


def sweep(settings: Settings, db: Database, store: ObjectStore, *, dry_run: bool, unknown_jobs: bool = False) -> Report:
    """Collects once, alone: raises ConflictError while somebody else does, and for `unknown_jobs` in a storage of which the
    database knows no job at all."""
    limits = Limits(
        timedelta(days=settings.resume_state_days),
        None if settings.adapter_days is None else timedelta(days=settings.adapter_days),
    )
    survey = collect(store, db, limits, dry_run=True) if dry_run or unknown_jobs else None
    if survey is not None and unknown_jobs:
        if survey.unknown_jobs.objects and not survey.known_folders:
            raise ConflictError(
                f"The database knows no job of {store.url}, so it is not the one that belongs to this storage; set "
                "ARKOR_RAY_DATABASE_URL or --data-dir to the service's own"
            )
        if survey.unknown_jobs.objects:
            survey.removed[Garbage.UNKNOWN_JOB], survey.unknown_jobs = survey.unknown_jobs, Amount()
    if survey is not None and dry_run:
        return survey
    holder = str(uuid.uuid4())

    def hold() -> bool:
        with db.write() as session:
            return leases.hold(session, LEASE, holder, LEASE_S)

    if not hold():
        raise ConflictError("The storage is being swept at this moment; try again when that is done")
    try:
        return collect(store, db, limits, dry_run=False, unknown_jobs=unknown_jobs, may_go_on=hold)
    finally:
        with db.write() as session:
            leases.release(session, LEASE, holder)


def collect(
    store: ObjectStore,
    db: Database,
    limits: Limits,
    *,
    dry_run: bool,
    unknown_jobs: bool = False,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Report:
    """One walk over the storage. A fault of the storage ends it, and is told in the report with what went before.

    `unknown_jobs`: folders of jobs that the database lacks go too. `may_go_on` is asked now and then.
    """
    report = Report(dry_run)
    collector = _Collector(store, db, limits, report, unknown_jobs)
    for part in (collector.collect_folders, collector.collect_uploads):
        try:
            part(may_go_on)
        except StorageError as error:
            report.problems.append(error.message)
    return report


class _Collector:
    def __init__(self, store: ObjectStore, db: Database, limits: Limits, report: Report, unknown_jobs: bool) -> None:
        self._store = store
        self._db = db
        self._limits = limits
        self._report = report
        self._unknown_jobs = unknown_jobs

    def collect_folders(self, may_go_on: Callable[[], bool]) -> None:
        now = self._store.now()  # before the listing: what is written in the meantime is younger than it looks
        folders = self._folders()
        while batch := list(islice(folders, FOLDERS_AT_A_TIME)):
            if not may_go_on():
                self._report.problems.append("Another collection has taken over.")
                return
            ids = {folder.job_id for folder, _ in batch}
            with self._db.read() as session:
                ends, kept = jobs.ends(session, ids), checkpoints.kept(session, ids)
            standalone = {job_id for job_id in ids - ends.keys() if self._is_standalone(job_id)}
            garbage = []
            for folder, objects in batch:
                ended = ends.get(folder.job_id)
                facts = Facts(
                    known=folder.job_id in ends,
                    standalone=folder.job_id in standalone,
                    ended=ended,
                    committed=ended is not None and self._is_committed(folder, objects, now - ended),
                    pinned=folder.kind is Kind.ADAPTER and _adapter_id(folder) in kept,
                )
                self._report.known_folders += facts.known
                if why := retention.decide(folder, objects, facts, now, self._limits):
                    garbage.append((folder, objects, why))
            self._take(garbage)

    def collect_uploads(self, may_go_on: Callable[[], bool]) -> None:
        latest = self._store.now() - retention.LEFTOVER_AGE
        for upload in self._store.uploads():
            if upload.begun > latest:
                continue
            if upload.key and not _is_ours(upload.key):
                self._leave_alone(upload.key, 0, upload.begun)
                continue
            if not self._report.dry_run:
                self._store.abort(upload)
            self._amount(Garbage.UPLOAD).add(0, upload.begun)

    def _folders(self) -> Iterator[tuple[Folder, list[ObjectInfo]]]:
        # A listing is sorted, so a folder's keys come one after the other.
        for folder, group in groupby(self._store.list(""), key=lambda info: layout.folder_of(info.key)):
            ours = []
            for info in group:
                if _is_ours(info.key):
                    ours.append(info)
                else:
                    self._leave_alone(info.key, info.size, info.modified)
            if folder is not None and ours:
                yield folder, ours

    def _leave_alone(self, key: str, size: int, modified: datetime) -> None:
        self._report.unknown_keys.add(size, modified)
        if len(self._report.examples) < EXAMPLES:
            self._report.examples.append(key)

    def _is_standalone(self, job_id: str) -> bool:
        return job_id != "" and self._store.head(layout.job_config_key(job_id)) is not None

    def _is_committed(self, folder: Folder, objects: list[ObjectInfo], age: timedelta) -> bool:
        if folder.kind is Kind.ADAPTER:
            return any(info.key == folder.prefix + folder.last_written for info in objects)
        if (
            folder.kind is Kind.RESUME and folder.step is not None and age < self._limits.resume_age
        ):  # else it goes anyway
            return self._store.head(layout.manifest_key(layout.adapter_id(folder.job_id, folder.step))) is not None
        return True

    def _take(self, garbage: list[tuple[Folder, list[ObjectInfo], Garbage]]) -> None:
        report = self._report
        going = []
        for folder, objects, why in garbage:
            if why is Garbage.UNKNOWN_JOB and not self._unknown_jobs:
                _add(report.unknown_jobs, objects)
            elif report.dry_run or self._may_go(folder, why):
                going.append((folder, objects, why))
        if not report.dry_run:
            self._delete([(folder, objects) for folder, objects, _ in going])
        for _, objects, why in going:
            _add(self._amount(why), objects)

    def _may_go(self, folder: Folder, why: Garbage) -> bool:
        """Asks once more what may have changed since the listing; after True an adapter is unknown to the database."""
        if folder.kind is Kind.ADAPTER and why is Garbage.UNCOMMITTED:
            return self._store.head(folder.prefix + folder.last_written) is None
        if why is Garbage.ADAPTER:
            with self._db.write() as session:
                return checkpoints.remove(session, _adapter_id(folder))
        return True

    def _delete(self, folders: list[tuple[Folder, list[ObjectInfo]]]) -> None:
        """What makes a folder whole goes first, of all of them."""
        first: list[str] = []
        then: list[str] = []
        for folder, objects in folders:
            for info in objects:
                (first if info.key == folder.prefix + folder.last_written else then).append(info.key)
        try:
            self._store.delete_all(first)
            self._store.delete_all(then)
        except StorageError as error:
            raise StorageError(
                f"{error.message} Some of the next {len(folders)} folders may be gone already."
            ) from error

    def _amount(self, why: Garbage) -> Amount:
        return self._report.removed.setdefault(why, Amount())


def _add(amount: Amount, objects: list[ObjectInfo]) -> None:
    for info in objects:
        amount.add(info.size, info.modified)


def _adapter_id(folder: Folder) -> str:
    if folder.step is None:
        return layout.final_adapter_id(folder.job_id)
    return layout.adapter_id(folder.job_id, folder.step)


def _is_ours(key: str) -> bool:
    """Whether the service may have made it. Others can make keys in our folders that stores do not take."""
    try:
        return layout.folder_of(check_key(key)) is not None
    except ValueError:
        return False
