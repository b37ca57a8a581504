"""A reconciler with a database of its own, whose loop is turned by hand."""

from __future__ import annotations

import pytest

from arkor_ray.db.session import Database
from arkor_ray.db.tables import Base
from arkor_ray.jobs.reconciler import Reconciler
from arkor_ray.settings import Settings
from tests.jobs.fake_launcher import Clock, FakeLauncher


@pytest.fixture
def db(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'arkor.db'}")
    Base.metadata.create_all(database.engine)
    yield database
    database.close()


@pytest.fixture
def launcher():
    return FakeLauncher()


@pytest.fixture
def settings(tmp_path):
    return Settings.load(data_dir=tmp_path, max_running_jobs=2, job_max_retries=1, cancel_grace_s=5)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def reconciler(settings, db, launcher, clock):
    return Reconciler(settings, db, launcher, clock=clock)
