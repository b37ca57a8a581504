"""The controller's sweep of the storage: when it comes, and that nothing waits for it."""

from __future__ import annotations

import threading

import pytest

from arkor_ray.db.session import Database
from arkor_ray.jobs import garbage, storage_sweep
from arkor_ray.jobs.reconciler import Reconciler
from arkor_ray.jobs.storage_sweep import StorageSweep
from arkor_ray.settings import Settings
from arkor_ray.storage import layout, open_store
from tests.db.databases import migrated_database
from tests.jobs.fake_launcher import FakeLauncher


@pytest.fixture
def db(request, tmp_path):
    yield from migrated_database("sqlite", request, tmp_path)


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings.load(data_dir=tmp_path)


def test_the_first_sweep_lets_the_start_pass_and_the_next_is_hours_away(settings, db: Database, monkeypatch):
    clock = [0.0]
    sweeps: list[str] = []
    monkeypatch.setattr(storage_sweep.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(garbage, "sweep", lambda settings, db, store, dry_run: sweeps.append(store.url) or _nothing())
    sweep = StorageSweep(settings, db)
    for at, expected in [(0, 0), (storage_sweep.FIRST_S, 1), (storage_sweep.EVERY_S, 1)]:
        clock[0] = at
        sweep.tick()
        sweep.wait()
        assert len(sweeps) == expected
    clock[0] = storage_sweep.FIRST_S + storage_sweep.EVERY_S
    sweep.tick()
    sweep.wait()
    assert sweeps == [settings.storage_url] * 2


def test_jobs_do_not_wait_for_a_sweep_and_none_begins_beside_it(settings, db, monkeypatch):
    monkeypatch.setattr(storage_sweep, "FIRST_S", 0.0)
    monkeypatch.setattr(storage_sweep, "EVERY_S", 0.0)
    go_on, begun = threading.Event(), []

    def slow(*_, **__):
        begun.append(1)
        go_on.wait(60)
        return _nothing()

    monkeypatch.setattr(garbage, "sweep", slow)
    sweep = StorageSweep(settings, db)
    reconciler = Reconciler(settings, db, FakeLauncher(), storage_sweep=sweep)
    assert reconciler.turn()
    assert reconciler.turn()
    assert begun == [1]
    go_on.set()
    sweep.wait()


def test_a_sweep_removes_what_may_go(settings, db, monkeypatch):
    monkeypatch.setattr(storage_sweep, "FIRST_S", 0.0)
    monkeypatch.setattr(garbage.retention, "SAFETY_AGE", garbage.timedelta())
    monkeypatch.setattr(garbage.retention, "LEFTOVER_AGE", garbage.timedelta())
    store = open_store(settings.storage_url)
    store.put(layout.doctor_prefix("x") + "small", b"x")
    sweep = StorageSweep(settings, db)
    sweep.tick()
    sweep.wait()
    assert list(store.list("")) == []


@pytest.mark.parametrize("error", [garbage.ConflictError("being swept"), RuntimeError("a fault")])
def test_whatever_is_wrong_with_a_sweep_is_only_logged(settings, db, monkeypatch, caplog, error):
    monkeypatch.setattr(storage_sweep, "FIRST_S", 0.0)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(garbage, "sweep", fail)
    caplog.set_level("INFO")
    sweep = StorageSweep(settings, db)
    sweep.tick()
    sweep.wait()
    assert str(error) in caplog.text


def _nothing() -> garbage.Report:
    return garbage.Report(dry_run=False)
