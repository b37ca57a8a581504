"""What may go and what stays, by the facts alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from arkor_ray.jobs.retention import Facts, Garbage, Limits, decide
from arkor_ray.storage import ObjectInfo, layout

NOW = datetime(2026, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
LIMITS = Limits(resume_age=7 * DAY, adapter_age=30 * DAY)
JOB = "3f0f4a5e-0000-4000-8000-000000000000"
ADAPTER = layout.manifest_key(layout.adapter_id(JOB, 10))
FINAL = layout.manifest_key(layout.final_adapter_id(JOB))
RESUME = layout.resume_prefix(JOB, 10) + "state.json"
DATA = layout.dataset_prefix(JOB) + "index.json"
DOCTOR = layout.doctor_prefix("x") + "small"
PROBE = layout.shared_probe_key("x")
LOG = layout.log_key(JOB, 1)
CONFIG = layout.job_config_key(JOB)
RUNNING = Facts(known=True)
UNKNOWN = Facts(known=False)


def ended(age: timedelta, *, committed: bool = True, pinned: bool = False) -> Facts:
    return Facts(known=True, ended=NOW - age, committed=committed, pinned=pinned)


def verdict(key: str, facts: Facts, *, ages: tuple[timedelta, ...] = (40 * DAY,), limits: Limits = LIMITS):
    folder = layout.folder_of(key)
    assert folder is not None
    return decide(folder, [ObjectInfo(key, 1, NOW - age) for age in ages], facts, NOW, limits)


@pytest.mark.parametrize("key", [ADAPTER, FINAL, RESUME, DATA, LOG])
def test_nothing_of_a_job_that_may_go_on_is_garbage_however_old(key):
    assert verdict(key, RUNNING, ages=(400 * DAY,)) is None


@pytest.mark.parametrize("key", [ADAPTER, FINAL, RESUME, DATA, LOG, DOCTOR, PROBE])
@pytest.mark.parametrize("facts", [UNKNOWN, ended(400 * DAY, committed=False), ended(400 * DAY)])
def test_one_young_object_keeps_its_folder(key, facts):
    assert verdict(key, facts, ages=(400 * DAY, HOUR - timedelta(seconds=1)), limits=Limits(0 * DAY, DAY)) is None


@pytest.mark.parametrize(("key", "why"), [(RESUME, Garbage.RESUME_STATE), (DATA, Garbage.DATASET)])
def test_what_only_resuming_needs_goes_some_days_after_the_end(key, why):
    assert verdict(key, ended(7 * DAY - HOUR)) is None
    assert verdict(key, ended(7 * DAY)) is why
    assert verdict(key, ended(2 * HOUR), ages=(HOUR,), limits=Limits(0 * DAY)) is why, "0 days: as soon as it is safe"


def test_adapters_are_kept_unless_there_is_a_limit():
    assert verdict(ADAPTER, ended(31 * DAY)) is Garbage.ADAPTER
    assert verdict(ADAPTER, ended(29 * DAY)) is None
    assert verdict(ADAPTER, ended(400 * DAY), limits=Limits(7 * DAY)) is None


def test_final_and_pinned_adapters_are_kept_always():
    assert verdict(FINAL, ended(400 * DAY)) is None
    assert verdict(ADAPTER, ended(400 * DAY, pinned=True)) is None


@pytest.mark.parametrize("key", [ADAPTER, FINAL, RESUME])
def test_what_was_never_committed_goes_after_a_day_of_quiet(key):
    assert verdict(key, ended(2 * DAY, committed=False), ages=(DAY,)) is Garbage.UNCOMMITTED
    assert verdict(key, ended(2 * DAY, committed=False), ages=(40 * DAY, DAY - HOUR)) is None


def test_folders_of_no_job_are_told_after_a_day():
    for key in (ADAPTER, FINAL, RESUME, DATA, LOG):
        assert verdict(key, UNKNOWN, ages=(DAY,)) is Garbage.UNKNOWN_JOB
        assert verdict(key, UNKNOWN, ages=(DAY - HOUR,)) is None


@pytest.mark.parametrize("key", [ADAPTER, FINAL, RESUME, DATA, CONFIG])
def test_jobs_run_without_the_service_are_for_their_owners_to_remove(key):
    assert verdict(key, Facts(known=False, standalone=True), ages=(400 * DAY,)) is None


def test_logs_are_kept_as_long_as_adapters():
    assert verdict(LOG, ended(31 * DAY)) is Garbage.LOG
    assert verdict(LOG, ended(29 * DAY)) is None
    assert verdict(LOG, ended(400 * DAY), limits=Limits(7 * DAY)) is None


@pytest.mark.parametrize("key", [DOCTOR, PROBE])
def test_a_check_may_take_a_day(key):
    assert verdict(key, UNKNOWN, ages=(DAY,)) is Garbage.PROBE
    assert verdict(key, UNKNOWN, ages=(DAY - HOUR,)) is None
