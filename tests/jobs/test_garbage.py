"""Collecting garbage on real stores and databases: what goes, what stays, in which order, and against whom it races."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import delete

from arkor_ray.db import checkpoints, endpoints, leases
from arkor_ray.db.session import Database
from arkor_ray.db.tables import EndpointRow, EventRow, JobRow
from arkor_ray.errors import ConflictError, NotFoundError, StorageError
from arkor_ray.jobs import garbage
from arkor_ray.jobs.garbage import collect, sweep
from arkor_ray.jobs.retention import Garbage, Limits
from arkor_ray.schemas.job import JobStatus
from arkor_ray.settings import Settings
from arkor_ray.storage import ObjectInfo, Upload, layout
from arkor_ray.storage.local import LocalStore
from tests.db.databases import both, migrated_database
from tests.jobs.stored_jobs import PassingStore, StoredJobs
from tests.storage.conftest import backend, open_s3, store  # noqa: F401
from tests.storage.test_uploads import begin_upload

WEEK = Limits(resume_age=timedelta(days=7))
MONTH = Limits(resume_age=timedelta(days=7), adapter_age=timedelta(days=30))


@pytest.fixture
def db(request, tmp_path):
    yield from migrated_database(getattr(request, "param", "sqlite"), request, tmp_path)


@pytest.fixture
def local(db, tmp_path) -> StoredJobs:
    return StoredJobs(db, PassingStore(LocalStore(tmp_path / "store")))


def remove_job(db: Database, job_id: str) -> None:
    """As if the database were an older one."""
    with db.write() as session:
        session.execute(delete(EventRow).where(EventRow.job_id == job_id))
        session.execute(delete(JobRow).where(JobRow.id == job_id))


def test_every_class_of_garbage_goes_and_everything_else_stays(db, store, backend):  # noqa: F811
    jobs = StoredJobs(db, PassingStore(store))
    running, ended, unknown = jobs.create(), jobs.create(), jobs.create()
    for job_id in (running, ended):
        jobs.commit_checkpoint(job_id, 10)
        jobs.begin_checkpoint(job_id, 20)
    jobs.commit_checkpoint(ended, None)
    jobs.end(ended)
    remove_job(db, unknown)
    store.put(layout.doctor_prefix("d") + "small", b"x")
    store.put("models/llama/config.json", b"{}")
    begin_upload(store, f"adapters/{layout.adapter_id(running, 30)}/adapter_model.safetensors")
    jobs.store.pass_time(days=8)
    before = jobs.stored()

    would = collect(jobs.store, db, WEEK, dry_run=True)
    assert (jobs.stored(), len(list(store.uploads()))) == (before, 1)
    did = collect(jobs.store, db, WEEK, dry_run=False)

    assert {why: (a.objects, a.size) for why, a in did.removed.items()} == {
        Garbage.RESUME_STATE: (4, 12),
        Garbage.DATASET: (2, 11),
        Garbage.UNCOMMITTED: (2, 4),
        Garbage.PROBE: (1, 1),
        Garbage.UPLOAD: (1, 0),
    }
    assert (would.removed, would.unknown_jobs) == (did.removed, did.unknown_jobs)
    assert (did.unknown_jobs.objects, did.unknown_keys.objects, did.examples) == (2, 1, ["models/llama/config.json"])
    assert list(store.uploads()) == []
    gone = [
        layout.resume_root(ended), layout.dataset_prefix(ended), "doctor/",
        layout.adapter_prefix(layout.adapter_id(ended, 20)),
    ]  # fmt: skip
    assert jobs.stored() == {key for key in before if not key.startswith(tuple(gone))}
    assert collect(jobs.store, db, WEEK, dry_run=False).removed == {}


def test_what_was_never_committed_goes_long_before_what_was(local):
    job_id = local.create()
    local.commit_checkpoint(job_id, 10)
    local.begin_checkpoint(job_id, 20)
    local.end(job_id)
    local.store.pass_time(days=2)
    report = collect(local.store, local.db, WEEK, dry_run=False)
    assert {why: (a.objects, a.size) for why, a in report.removed.items()} == {Garbage.UNCOMMITTED: (4, 10)}
    assert len(local.stored(layout.resume_prefix(job_id, 10))) == 2


@pytest.mark.parametrize("stopped", [True, False])
def test_a_job_whose_driver_may_still_write_loses_nothing(local, stopped):
    job_id = local.create()
    local.begin_checkpoint(job_id, 10)
    local.end(job_id, JobStatus.CANCELLED, stopped=stopped)
    local.store.pass_time(days=30)
    report = collect(local.store, local.db, WEEK, dry_run=False)
    assert bool(report.removed) is stopped
    assert bool(local.stored()) is not stopped


def test_a_checkpoint_that_is_being_written_survives_collections_without_end(local, monkeypatch):
    """Retention of nothing, a job that runs, and a collector that never rests."""
    none = Limits(resume_age=timedelta(), adapter_age=timedelta(seconds=1))
    local.store.pass_time(days=30)  # every object is old the moment it is written
    monkeypatch.setattr(local.store, "uploads", lambda: iter(()), raising=False)  # only their age protects these
    job_id, done = local.create(), threading.Event()
    rounds = 0

    def collect_all_the_time() -> None:
        nonlocal rounds
        while not done.is_set():
            collect(local.store, local.db, none, dry_run=False)
            rounds += 1

    collector = threading.Thread(target=collect_all_the_time)
    collector.start()
    try:
        adapters = [local.commit_checkpoint(job_id, step) for step in range(1, 30)]
    finally:
        done.set()
        collector.join()
    assert rounds
    for adapter_id in adapters:
        assert len(local.stored(layout.adapter_prefix(adapter_id))) == 3
    assert len(local.stored(layout.resume_root(job_id))) == 2 * len(adapters)


def test_a_checkpoint_committed_after_the_listing_survives(local, monkeypatch):
    job_id = local.create()
    adapter_id = local.begin_checkpoint(job_id, 10)
    local.end(job_id)
    local.store.pass_time(days=2)
    listing = list(local.store.list(""))
    local.store.put(layout.manifest_key(adapter_id), b"{}", if_absent=True)
    monkeypatch.setattr(local.store, "list", lambda prefix: iter(listing), raising=False)
    assert collect(local.store, local.db, WEEK, dry_run=False).removed == {}
    assert local.store.head(layout.adapter_prefix(adapter_id) + "adapter_config.json") is not None


@pytest.mark.parametrize("died_after", [1, 2, 3, 4])
def test_a_death_between_two_deletions_leaves_nothing_that_looks_whole(local, monkeypatch, died_after):
    job_id = local.create()
    first, last = (local.commit_checkpoint(job_id, step) for step in (10, 20))
    local.end(job_id, JobStatus.CANCELLED)
    local.store.pass_time(days=31)
    really, left = local.store.delete, died_after

    def die(key: str) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        really(key)

    monkeypatch.setattr(local.store, "delete", die)
    with pytest.raises(KeyboardInterrupt):
        collect(local.store, local.db, MONTH, dry_run=False)
    assert local.store.deleted[0] == layout.manifest_key(first)
    with local.db.read() as session:
        assert checkpoints.find(session, job_id, 10) is None
    for prefix, name in [
        (layout.resume_prefix(job_id, 10), layout.RESUME_INDEX_NAME),
        (layout.dataset_prefix(job_id), layout.DATASET_INDEX_NAME),
    ]:
        keys = local.stored(prefix)
        assert prefix + name not in keys or len(keys) == 2, "whole, or without what makes it whole"
    monkeypatch.setattr(local.store, "delete", really)
    collect(local.store, local.db, MONTH, dry_run=False)
    assert local.stored() == local.stored(layout.adapter_prefix(last))


@both
def test_old_adapters_go_except_the_last_of_a_job_and_those_that_are_served(local):
    finished, cancelled = local.create(), local.create()
    for job_id in (finished, cancelled):
        for step in (10, 20, 30):
            local.commit_checkpoint(job_id, step)
    final = local.commit_checkpoint(finished, None)
    served = layout.adapter_id(finished, 20)
    local.serve(finished, served)
    local.end(finished)
    local.end(cancelled, JobStatus.CANCELLED)
    local.store.pass_time(days=31)
    assert Garbage.ADAPTER not in collect(local.store, local.db, WEEK, dry_run=True).removed
    would = collect(local.store, local.db, MONTH, dry_run=True).removed[Garbage.ADAPTER]
    did = collect(local.store, local.db, MONTH, dry_run=False).removed[Garbage.ADAPTER]
    assert (did.objects, did.size) == (would.objects, would.size)
    left = {key.split("/")[1] for key in local.stored("adapters/")}
    assert left == {served, final, layout.adapter_id(cancelled, 30)}
    with local.db.read() as session:
        assert {
            row.adapter_id for job in (finished, cancelled) for row in checkpoints.list_for_job(session, job)
        } == left


@both
def test_an_endpoint_that_turns_to_an_adapter_at_the_last_moment_keeps_it(local, monkeypatch):
    job_id = local.create()
    old, served, _ = (local.commit_checkpoint(job_id, step) for step in (10, 20, 30))
    endpoint_id = local.serve(job_id, served)
    local.end(job_id)
    local.store.pass_time(days=31)
    kept = checkpoints.kept

    def turn_after_the_look(session, job_ids):
        found = kept(session, job_ids)
        with local.db.write() as other:
            project_id = other.get(EndpointRow, endpoint_id).project_id
            endpoints.change(other, project_id, endpoint_id, adapter_id=old)
        return found

    monkeypatch.setattr(checkpoints, "kept", turn_after_the_look)
    collect(local.store, local.db, MONTH, dry_run=False)
    assert len(local.stored(layout.adapter_prefix(old))) == 3
    monkeypatch.setattr(checkpoints, "kept", kept)
    assert Garbage.ADAPTER in collect(local.store, local.db, MONTH, dry_run=False).removed, "the one it turned from"
    with pytest.raises(NotFoundError, match="deleted in the meantime"), local.db.write() as session:
        project_id = session.get(EndpointRow, endpoint_id).project_id
        endpoints.change(session, project_id, endpoint_id, adapter_id=served)


def test_folders_of_unknown_jobs_go_only_when_asked_and_never_by_a_database_of_another_service(local, tmp_path):
    settings = Settings.load(data_dir=tmp_path)
    unknown = local.create()
    remove_job(local.db, unknown)
    local.store.pass_time(days=2)
    assert sweep(settings, local.db, local.store, dry_run=False).unknown_jobs.objects == 2
    with pytest.raises(ConflictError, match="ARKOR_RAY_DATABASE_URL"):
        sweep(settings, local.db, local.store, dry_run=False, unknown_jobs=True)
    known = local.create()
    would = sweep(settings, local.db, local.store, dry_run=True, unknown_jobs=True)
    assert (would.removed[Garbage.UNKNOWN_JOB].objects, len(local.stored())) == (2, 4)
    sweep(settings, local.db, local.store, dry_run=False, unknown_jobs=True)
    assert local.stored() == local.stored(layout.dataset_prefix(known))


def test_a_job_that_was_run_without_the_service_stays_even_then(local, tmp_path):
    settings = Settings.load(data_dir=tmp_path)
    standalone, unknown = local.create(), local.create()
    for job_id in (standalone, unknown):
        local.commit_checkpoint(job_id, 10)
        remove_job(local.db, job_id)
    local.store.put(layout.job_config_key(standalone), b"{}")
    known = local.create()
    local.store.pass_time(days=400)
    sweep(settings, local.db, local.store, dry_run=False, unknown_jobs=True)
    assert {job_id for job_id in (standalone, unknown, known) if any(job_id in key for key in local.stored())} == {
        standalone,
        known,
    }
    assert len([key for key in local.stored() if standalone in key]) == 8


def test_keys_that_no_store_takes_are_told_even_in_a_folder_of_ours(local, monkeypatch):
    job_id = local.create()
    local.end(job_id)
    local.store.pass_time(days=8)
    listing = list(local.store.list(""))
    odd = ObjectInfo(layout.dataset_prefix(job_id) + "a/.hidden", 5, listing[0].modified)
    monkeypatch.setattr(local.store, "list", lambda prefix: iter([odd, *listing]), raising=False)
    report = collect(local.store, local.db, WEEK, dry_run=False)
    assert (report.examples, report.removed[Garbage.DATASET].objects) == ([odd.key], 2)


def test_uploads_of_others_are_told_and_left_alone(local, monkeypatch):
    job_id = local.create()
    old = local.store.now()
    ours = Upload(layout.adapter_prefix(layout.adapter_id(job_id, 10)) + "adapter_model.safetensors", "1", old)
    foreign = [Upload(key, "2", old) for key in ("_tmp/.staging/part-1", "models/llama.bin", "adapters/.hidden/x")]
    unnamed = Upload("", "3", old)  # a local store's
    aborted = []
    monkeypatch.setattr(local.store, "uploads", lambda: iter([ours, *foreign, unnamed]), raising=False)
    monkeypatch.setattr(local.store, "abort", aborted.append, raising=False)
    local.store.pass_time(days=8)
    for dry_run in (True, False):
        report = collect(local.store, local.db, WEEK, dry_run=dry_run)
        assert report.removed[Garbage.UPLOAD].objects == 2
        assert (report.unknown_keys.objects, report.examples) == (3, [upload.key for upload in foreign])
        assert aborted == ([] if dry_run else [ours, unnamed])


def test_only_one_collects_at_a_time(local, tmp_path):
    settings = Settings.load(data_dir=tmp_path)
    with local.db.write() as session:
        leases.hold(session, garbage.LEASE, "another", 60)
    with pytest.raises(ConflictError, match="being swept"):
        sweep(settings, local.db, local.store, dry_run=False)
    sweep(settings, local.db, local.store, dry_run=True)
    with local.db.write() as session:
        leases.release(session, garbage.LEASE, "another")
    sweep(settings, local.db, local.store, dry_run=False)
    sweep(settings, local.db, local.store, dry_run=False)


def test_one_that_lost_its_lease_stops(local):
    job_id = local.create()
    local.end(job_id)
    local.store.pass_time(days=8)
    report = collect(local.store, local.db, WEEK, dry_run=False, may_go_on=lambda: False)
    assert (report.removed, len(report.problems), len(local.stored())) == ({}, 1, 2)


def test_a_fault_of_the_storage_is_told_with_what_went_before_it(local, monkeypatch):
    first, second = sorted(local.create() for _ in range(2))
    for job_id in (first, second):
        local.end(job_id)
    local.store.pass_time(days=8)
    monkeypatch.setattr(garbage, "FOLDERS_AT_A_TIME", 1)
    really = local.store.delete

    def refuse(key: str) -> None:
        if second in key:
            raise StorageError("AccessDenied.")
        really(key)

    monkeypatch.setattr(local.store, "delete", refuse)
    report = collect(local.store, local.db, WEEK, dry_run=False)
    assert report.removed[Garbage.DATASET].objects == 2
    assert report.problems == ["AccessDenied. Some of the next 1 folders may be gone already."]


def test_a_large_storage_is_walked_without_being_held(local, monkeypatch):
    """Thousands of folders: deletions begin long before the listing ends."""
    job_id = local.create()
    local.end(job_id)
    local.store.pass_time(days=8)
    old = local.store.now() - timedelta(days=8)
    listed = 0
    listed_at_first_deletion = None

    def many(prefix: str):
        nonlocal listed
        for step in range(5_000):
            listed += 1
            yield ObjectInfo(layout.resume_prefix(job_id, step) + "state.json", 10, old)

    def note(key: str) -> None:
        nonlocal listed_at_first_deletion
        listed_at_first_deletion = listed_at_first_deletion or listed

    monkeypatch.setattr(local.store, "list", many, raising=False)
    monkeypatch.setattr(local.store, "head", lambda key: ObjectInfo(key, 1, old), raising=False)
    monkeypatch.setattr(local.store, "delete", note)
    report = collect(local.store, local.db, WEEK, dry_run=False)
    assert (report.removed[Garbage.RESUME_STATE].objects, report.removed[Garbage.RESUME_STATE].size) == (
        5_000,
        50_000,
    )
    assert listed_at_first_deletion is not None
    assert listed_at_first_deletion <= garbage.FOLDERS_AT_A_TIME + 1
