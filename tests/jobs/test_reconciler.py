"""The reconciler against a real database and a launcher told what to say; the loop is turned by hand."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import event as sqlalchemy_event

from arkor_ray.db import checkpoints, leases, runs
from arkor_ray.db.session import Database
from arkor_ray.db.tables import CounterRow, EventRow, JobRow, LeaseRow, RunRow
from arkor_ray.events import publisher
from arkor_ray.jobs import reconciler as module
from arkor_ray.jobs.decision import SubmissionState
from arkor_ray.jobs.reconciler import Reconciler
from arkor_ray.jobs.room import WorkerGroup
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.job import JobConfig, JobStatus
from arkor_ray.settings import Settings
from arkor_ray.storage import layout
from tests.db.endpoint_rows import publish, run_of
from tests.db.factories import create_job
from tests.jobs.fake_launcher import FakeLauncher, due_in, due_now, finish
from tests.jobs.stored_jobs import manifest_of


def job(db: Database, job_id: str) -> JobRow:
    with db.read() as session:
        return session.get(JobRow, job_id)


def test_jobs_are_launched_oldest_first_up_to_the_limit(db, reconciler, launcher):
    first, second, third = (create_job(db) for _ in range(3))
    reconciler.turn()
    reconciler.turn()
    assert launcher.submitted == [f"{first}-1", f"{second}-1"]
    finish(db, first, JobStatus.COMPLETED)
    reconciler.turn()
    assert launcher.submitted[-1] == f"{third}-1"


def test_a_job_that_waits_for_serving_alone_leaves_its_place_to_the_next(db, reconciler, launcher):
    first, second, third = (create_job(db) for _ in range(3))
    reconciler.turn()
    checkpoint_at(db, first, 10)
    reconciler.turn()
    assert launcher.submitted == [f"{first}-1", f"{second}-1"]
    checkpoint_at(db, first, None)
    reconciler.turn()
    assert launcher.submitted[2:] == [f"{third}-1"]


def loaded_jobs(reconciler: Reconciler) -> list[str]:
    """The ids of the jobs whose rows a turn loads, in that order."""
    loaded: list[str] = []

    def note(row: JobRow, _context: object) -> None:
        loaded.append(row.id)

    sqlalchemy_event.listen(JobRow, "load", note)
    try:
        reconciler.turn()
    finally:
        sqlalchemy_event.remove(JobRow, "load", note)
    return loaded


def test_jobs_that_wait_for_a_place_are_not_loaded(db, reconciler, launcher, monkeypatch):
    monkeypatch.setattr(module, "WORKERS_S", 0)
    first, second, third, _, _ = (create_job(db) for _ in range(5))
    places = [first, second]
    assert loaded_jobs(reconciler) == [*places, *places], "once to launch them, once to look at their workers"
    assert loaded_jobs(reconciler) == [*places, *places]
    finish(db, first, JobStatus.CANCELLED)
    assert loaded_jobs(reconciler)[:3] == [*places, third]


def test_a_job_whose_next_attempt_is_not_due_leaves_its_place_to_the_next(db, reconciler, launcher):
    lost, second, third = (create_job(db) for _ in range(3))
    reconciler.turn()
    launcher.die(f"{lost}-1")
    reconciler.turn()
    assert launcher.submitted == [f"{lost}-1", f"{second}-1"]
    due_in(db, lost, timedelta(hours=1))
    reconciler.turn()
    assert launcher.submitted == [f"{lost}-1", f"{second}-1", f"{third}-1"]
    due_now(db, lost)
    finish(db, second, JobStatus.COMPLETED)
    reconciler.turn()
    assert launcher.submitted[3:] == [f"{lost}-2"]


def test_a_job_that_is_cancelled_while_it_waits_is_never_launched(db, reconciler, launcher):
    running, lost, queued = (create_job(db) for _ in range(3))
    reconciler.turn()
    launcher.die(f"{lost}-1")
    reconciler.turn()
    for job_id in (lost, queued):
        finish(db, job_id, JobStatus.CANCELLED)
    for _ in range(2):
        reconciler.turn()
    assert launcher.submitted == [f"{running}-1", f"{lost}-1"]
    assert job(db, lost).stopped_at is not None


class FakeServing:
    """Takes note of the models that are to be ready."""

    def __init__(self) -> None:
        self.prefetched: list[str] = []

    def precision_of(self, config: JobConfig) -> str:
        return "fp32"

    def prefetch(self, base_model: str, precision: str) -> None:
        self.prefetched.append(base_model)


def test_serving_gets_ready_for_the_model_of_a_launched_job(db, launcher, tmp_path):
    settings = Settings.load(data_dir=tmp_path, models={"tiny": "base/tiny", "big": "base/big"}, max_running_jobs=1)
    serving = FakeServing()
    source = {"type": "huggingface", "name": "owner/rows"}
    for model in ("tiny", "big"):
        create_job(db, config={"model": model, "datasetSource": source})
    Reconciler(settings, db, launcher, serving).turn()
    assert serving.prefetched == ["base/tiny"]


def test_a_job_is_not_lost_when_we_die_between_claim_and_submission(db, reconciler, launcher, settings):
    job_id = create_job(db)
    launcher.refusing = True
    reconciler.turn()
    assert job(db, job_id).attempt == 1
    launcher.refusing = False
    reconciler.turn()  # finds no such submission
    due_now(db, job_id)
    reconciler.turn()
    assert launcher.submitted == [f"{job_id}-2"]
    assert job(db, job_id).retries == 0


def test_after_a_restart_of_ray_every_unfinished_job_is_launched_again(db, reconciler, launcher):
    ids = [create_job(db) for _ in range(2)]
    reconciler.turn()
    launcher.forget_all()
    reconciler.turn()
    for job_id in ids:
        due_now(db, job_id)
    reconciler.turn()
    assert launcher.submitted[2:] == [f"{job_id}-2" for job_id in ids]


def test_a_dead_driver_is_retried_then_the_job_fails_with_one_terminal_event(db, reconciler, launcher):
    job_id = create_job(db)
    reconciler.turn()
    launcher.die(f"{job_id}-1")
    reconciler.turn()
    assert job(db, job_id).retries == 1
    due_now(db, job_id)
    reconciler.turn()
    launcher.die(f"{job_id}-2")
    reconciler.turn()
    reconciler.turn()
    assert job(db, job_id).status == "failed"
    assert "infrastructure" in job(db, job_id).error
    with db.read() as session:
        assert [(e.number, e.type) for e in session.query(EventRow)] == [(1, "training.failed")]


def checkpoint_at(db: Database, job_id: str, step: int | None) -> None:
    with db.write() as session:
        adapter_id = layout.final_adapter_id(job_id) if step is None else layout.adapter_id(job_id, step)
        checkpoints.record(session, manifest_of(job_id, adapter_id, step))


def lose_attempt(db: Database, reconciler: Reconciler, launcher: FakeLauncher, job_id: str) -> None:
    """The newest attempt dies, and the next is launched if there is to be one."""
    launcher.die(job(db, job_id).submission_id)
    reconciler.turn()
    if job(db, job_id).status == "queued":
        due_now(db, job_id)
        reconciler.turn()


def test_the_budget_is_given_back_when_a_checkpoint_is_newer_than_the_last_loss(db, reconciler, launcher):
    job_id = create_job(db)
    reconciler.turn()
    for step in (10, 20, 30, 40):
        checkpoint_at(db, job_id, step)
        lose_attempt(db, reconciler, launcher, job_id)
        assert job(db, job_id).retries == 1
    lose_attempt(db, reconciler, launcher, job_id)
    assert job(db, job_id).status == "failed", "it did not get further"


def test_a_job_that_can_never_be_submitted_fails_in_the_end(db, reconciler, launcher):
    job_id = create_job(db)
    launcher.refusing = True
    for _ in range(20):
        reconciler.turn()
        if job(db, job_id).status != "queued":
            break
        due_now(db, job_id)
    assert job(db, job_id).status == "failed"
    assert "Ray does not know" in job(db, job_id).error


def test_a_cancelled_job_is_stopped_after_its_grace_and_then_left_alone(db, reconciler, launcher):
    job_id = create_job(db)
    reconciler.turn()
    finish(db, job_id, JobStatus.CANCELLED)
    reconciler.turn()
    assert launcher.stopped == []
    with db.write() as session:
        session.get(JobRow, job_id).completed_at = utcnow() - timedelta(seconds=6)
    reconciler.turn()
    reconciler.turn()
    reconciler.turn()
    assert launcher.stopped == [f"{job_id}-1"]
    assert job(db, job_id).stopped_at is not None
    assert job(db, job_id).dataset_token is None


def test_an_older_attempt_can_no_longer_write(db, reconciler, launcher):
    job_id = create_job(db)
    reconciler.turn()
    launcher.die(f"{job_id}-1")
    reconciler.turn()
    due_now(db, job_id)
    reconciler.turn()
    with pytest.raises(publisher.StaleAttemptError), db.write() as session:
        publisher.append(session, job_id, "training.log", {"step": 1}, key="log:1", attempt=1)


def test_of_two_controllers_one_acts(db, settings, launcher):
    one, two = Reconciler(settings, db, launcher), Reconciler(settings, db, launcher)
    create_job(db)
    assert one.turn()
    assert not two.turn()
    one.release()
    assert two.turn()
    assert len(launcher.submitted) == 1


def test_an_expired_lease_is_taken_over(db, settings, launcher, monkeypatch):
    monkeypatch.setattr(module, "LEASE_S", 5.0)
    one, two = Reconciler(settings, db, launcher), Reconciler(settings, db, launcher)
    assert one.turn()
    with db.write() as session:
        session.get(LeaseRow, module.LEASE).expires_at = utcnow() - timedelta(seconds=1)
    assert two.turn()
    assert not one.turn()


def test_the_lease_is_renewed_while_a_turn_is_slow(db, settings, launcher, clock, monkeypatch):
    one, two = Reconciler(settings, db, launcher, clock=clock), Reconciler(settings, db, launcher)
    for _ in range(3):
        create_job(db)
    one.turn()
    renewed = []

    def slow_state(submission):
        clock.advance(module.LEASE_S - 1)
        with db.read() as session:
            renewed.append(session.get(LeaseRow, module.LEASE).expires_at)
        return SubmissionState.RUNNING, ""

    monkeypatch.setattr(launcher, "state", slow_state)
    assert one.turn()
    assert len(renewed) == 2 and renewed[0] < renewed[1]
    assert not two.turn()


def test_a_turn_ends_where_another_has_taken_the_lease_meanwhile(db, settings, launcher, clock, monkeypatch):
    one, two = Reconciler(settings, db, launcher, clock=clock), Reconciler(settings, db, launcher)
    for _ in range(2):
        create_job(db)
    one.turn()
    asked = []

    def is_overtaken(submission):
        asked.append(submission)
        clock.advance(module.LEASE_S + 1)
        one.release()
        assert two._leads()
        return SubmissionState.RUNNING, ""

    monkeypatch.setattr(launcher, "state", is_overtaken)
    assert not one.turn()
    assert len(asked) == 1


def sign_of_life(db: Database, submission: str) -> None:
    with db.write() as session:
        leases.hold(session, submission, submission, 60)


def test_an_attempt_that_gives_no_sign_of_life_is_stopped_and_launched_again(db, reconciler, launcher, clock):
    job_id = create_job(db)
    reconciler.turn()
    for _ in range(20):
        clock.advance(5)
        sign_of_life(db, f"{job_id}-1")
        reconciler.turn()
    assert launcher.stopped == []
    for _ in range(13):
        clock.advance(5)
        reconciler.turn()
    assert launcher.stopped == [f"{job_id}-1"]
    due_now(db, job_id)
    reconciler.turn()
    assert launcher.submitted == [f"{job_id}-1", f"{job_id}-2"]
    assert job(db, job_id).retries == 1


def test_an_attempt_that_cannot_be_stopped_is_launched_again_all_the_same(db, reconciler, launcher, clock, monkeypatch):
    job_id = create_job(db)
    reconciler.turn()
    sign_of_life(db, f"{job_id}-1")
    monkeypatch.setattr(launcher, "stop", lambda _: (_ for _ in ()).throw(TimeoutError("its node is cut off")))
    for _ in range(14):
        clock.advance(5)
        reconciler.turn()
    assert job(db, job_id).submission_id is None


def test_workers_of_an_attempt_that_is_no_more_are_taken_back(db, reconciler, launcher, monkeypatch):
    monkeypatch.setattr(module, "WORKERS_S", 0)
    job_id, ended = create_job(db), create_job(db)
    reconciler.turn()
    launcher.groups = {"a": WorkerGroup(f"{job_id}-1"), "b": WorkerGroup(f"{ended}-1")}
    reconciler.turn()
    assert set(launcher.groups) == {"a", "b"}
    launcher.die(f"{job_id}-1")
    reconciler.turn()
    due_now(db, job_id)
    reconciler.turn()
    launcher.groups["a"] = WorkerGroup(f"{job_id}-1")  # a ghost has made one
    launcher.groups["c"] = WorkerGroup(f"{job_id}-2")
    reconciler.turn()
    assert set(launcher.groups) == {"b", "c"}
    finish(db, ended, JobStatus.CANCELLED)
    reconciler.turn()
    assert set(launcher.groups) == {"b", "c"}, "it may still be saving its state"
    launcher.die(f"{ended}-1")
    reconciler.turn()
    reconciler.turn()
    assert set(launcher.groups) == {"c"}


def test_a_job_whose_workers_or_driver_find_no_room_is_told_so(db, reconciler, launcher, clock, monkeypatch):
    monkeypatch.setattr(module, "WORKERS_S", 0)
    job_id, other = create_job(db), create_job(db)
    reconciler.turn()
    launcher.states[f"{other}-1"] = SubmissionState.PENDING
    for _ in range(3):
        launcher.keep_waiting(f"{job_id}-1")
        reconciler.turn()
        clock.advance(40)
        sign_of_life(db, f"{job_id}-1")
    with db.read() as session:
        told = {e.job_id: (e.type, e.data["workers"]) for e in session.query(EventRow)}
    assert told == {job_id: ("resources.waiting", 2), other: ("resources.waiting", 0)}


def test_what_is_kept_about_signs_of_life_goes_with_the_job(db, reconciler, launcher):
    job_id = create_job(db)
    reconciler.turn()
    sign_of_life(db, f"{job_id}-1")
    finish(db, job_id, JobStatus.COMPLETED)
    launcher.die(f"{job_id}-1")
    reconciler.turn()
    with db.read() as session:
        assert session.get(LeaseRow, f"{job_id}-1") is None


def test_one_job_that_cannot_be_advanced_does_not_hold_up_the_others(db, reconciler, launcher, monkeypatch):
    bad, good = create_job(db), create_job(db)
    submit = launcher.submit

    def refuse_one(job_id, attempt, environment):
        if job_id == bad:
            raise RuntimeError("no agent")
        submit(job_id, attempt, environment)

    monkeypatch.setattr(launcher, "submit", refuse_one)
    reconciler.turn()
    assert launcher.submitted == [f"{good}-1"]


def count_runs(db: Database) -> int:
    with db.read() as session:
        return session.query(RunRow).count()


def store_old_runs(db: Database, count: int) -> None:
    with db.write() as session:
        session.merge(CounterRow(name="endpoints", value=0))
    endpoint = publish(db, f"kept-for-a-day-{count}", "days", 1)
    with db.write() as session:
        runs.add_all(session, [run_of(endpoint, utcnow() - timedelta(days=2)) for _ in range(count)])


def test_old_runs_are_swept_some_a_turn_until_none_is_left_and_then_only_now_and_then(
    db, reconciler, settings, launcher, monkeypatch
):
    monkeypatch.setattr(module, "SWEPT_RUNS", 2)
    store_old_runs(db, 5)
    left = []
    for _ in range(4):
        reconciler.turn()
        left.append(count_runs(db))
    assert left == [3, 1, 0, 0]
    store_old_runs(db, 1)
    reconciler.turn()
    assert count_runs(db) == 1, "the next sweep is a minute away"
    reconciler.release()
    Reconciler(settings, db, launcher).turn()
    assert count_runs(db) == 0, "one that has just started does not know when the last one was"


def test_a_sweep_that_fails_holds_up_no_job(db, reconciler, launcher, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no such table")

    monkeypatch.setattr(runs, "sweep", refuse)
    job_id = create_job(db)
    with pytest.raises(RuntimeError):
        reconciler.turn()
    reconciler.turn()
    assert launcher.submitted == [f"{job_id}-1"]
