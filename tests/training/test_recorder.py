"""The recorder on a real database, with a serving that is told what to answer."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from arkor_ray.db import checkpoints, jobs, leases
from arkor_ray.db.session import Database
from arkor_ray.db.tables import Base, JobRow
from arkor_ray.errors import AdapterError, ServiceUnavailableError
from arkor_ray.events.stream import read_events
from arkor_ray.schemas import event
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.checkpoint import CheckpointManifest, ManifestFile
from arkor_ray.telemetry import metrics
from arkor_ray.training import recorder as module
from arkor_ray.training.recorder import Recorder
from tests.db.factories import create_job
from tests.serving.fake_replica import FakeReplica

WEIGHTS = b"weights"


class FakeServing:
    """Answers `admit`; `refuse` and `go_away` change what it says, `admitted` is what it was given."""

    def __init__(self) -> None:
        self.admitted: list[tuple[str, bytes | None]] = []
        self.failures: list[Exception] = []

    def refuse(self) -> None:
        self.failures = [AdapterError("rank too large")] * 100

    def go_away(self, times: int) -> None:
        self.failures = [ServiceUnavailableError("starting")] * times

    def find_no_room(self) -> None:
        self.failures = [ServiceUnavailableError(f"no node has a GPU, {free} CPUs are free") for free in range(1000)]

    async def admit(self, manifest, data):
        if self.failures:
            raise self.failures.pop()
        self.admitted.append((manifest["adapter_id"], data))
        return {"adapter_id": manifest["adapter_id"], "parity": None}


@pytest.fixture
def serving(monkeypatch):
    fake = FakeServing()
    monkeypatch.setattr(module.serving, "admit", fake.admit)
    return fake


@pytest.fixture
def db(tmp_path, monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_DATA_DIR", str(tmp_path))
    database = Database(f"sqlite:///{tmp_path / 'arkor.db'}")
    Base.metadata.create_all(database.engine)
    yield database
    database.close()


@pytest.fixture
def job_id(db):
    created = create_job(db)
    with db.write() as session:
        jobs.claim_attempt(session, created, attempt=1, submission_id="s")
    return created


def manifest(job_id: str, step: int, *, final: bool = False) -> dict:
    return CheckpointManifest(
        adapter_id=f"{job_id}-final" if final else f"{job_id}-step-{step}",
        job_id=job_id,
        step=step,
        final=final,
        base_model="/base",
        base_precision="fp32",
        r=8,
        lora_alpha=16,
        target_modules=["q_proj"],
        files=[
            ManifestFile(path="adapter_model.safetensors", size_bytes=7, sha256=hashlib.sha256(WEIGHTS).hexdigest())
        ],
        created_at=utcnow(),
    ).model_dump(mode="json")


def told(db, job_id):
    with db.read() as session:
        return [(e.type, e.step) for e in read_events(session, job_id)]


def run(story):
    return asyncio.run(asyncio.wait_for(story, 20))


def test_notices_wait_for_the_start_and_a_restarted_recorder_does_not_wait_again(db, job_id, serving):
    async def story():
        first = Recorder(job_id, 1)
        preflight = asyncio.create_task(first.notice("dataset.preflight", {}))
        await asyncio.sleep(0.05)
        await first.tell([("started", ({},)), ("log", ({"step": 1, "loss": 2.0},))])
        await preflight
        second = Recorder(job_id, 1)  # as after a SIGKILL
        await second.notice("checkpoint.delayed", {"step": 1})

    run(story())
    types = [type for type, _ in told(db, job_id)]
    assert types[0] == event.STARTED
    assert sorted(types) == sorted([event.STARTED, event.LOG, "dataset.preflight", "checkpoint.delayed"])


def test_a_checkpoint_is_announced_once_and_loaded_from_what_was_staged(db, job_id, serving):
    async def story():
        recorder = Recorder(job_id, 1)
        await recorder.started({})
        await recorder.stage(f"{job_id}-step-10", WEIGHTS)
        await recorder.stage(f"{job_id}-step-20", b"of an attempt that did not commit")
        for step in (10, 20, 10):
            await recorder.checkpoint(manifest(job_id, step))

    run(story())
    assert serving.admitted == [(f"{job_id}-step-10", WEIGHTS), (f"{job_id}-step-20", None)]
    assert told(db, job_id)[1:] == [(event.CHECKPOINT, 10), (event.CHECKPOINT, 20)]


def test_completed_waits_until_serving_answers(db, job_id, serving):
    serving.go_away(times=2)

    async def story():
        recorder = Recorder(job_id, 1)
        await recorder.started({})
        return await recorder.completed(manifest(job_id, 20, final=True), {"totalSteps": 20})

    assert run(story()) is True
    assert told(db, job_id)[-1] == (event.COMPLETED, 20)


def reasons(db, job_id, type):
    with db.read() as session:
        return [e.data["reason"] for e in read_events(session, job_id) if e.type == type]


def test_a_job_that_waits_for_serving_alone_says_so_once_per_cause(db, job_id, serving, monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_CHECKPOINT_READY_TIMEOUT_S", "0.05")
    serving.find_no_room()

    async def story():
        recorder = Recorder(job_id, 1)
        await recorder.started({})
        completing = asyncio.create_task(recorder.completed(manifest(job_id, 20, final=True), {}))
        left = len(serving.failures)
        while len(serving.failures) > left - 4:
            await asyncio.sleep(0.01)
        serving.failures = [ServiceUnavailableError("the model is too large for the card")]
        while len(reasons(db, job_id, event.SERVING_WAITING)) < 2:
            await asyncio.sleep(0.01)
        return await completing

    assert run(story()) is True
    no_room, too_large = reasons(db, job_id, event.SERVING_WAITING)
    assert "is stored" in no_room and "no node has a GPU" in no_room
    assert "too large for the card" in too_large
    assert told(db, job_id)[-1] == (event.COMPLETED, 20)


def test_a_replica_that_shuts_down_while_it_loads_a_checkpoint_is_replaced_and_asked_again(db, job_id, monkeypatch):
    async def runs(*_, **__):
        return None

    replica = FakeReplica(asyncio.CancelledError(), times=2)  # as Serve says it

    async def handle(*_):
        return replica

    monkeypatch.setattr(module.serving, "_handles", {})
    monkeypatch.setattr(module.serving, "ensure_serving", runs)
    monkeypatch.setattr(module.serving, "server_handle", handle)

    async def story():
        recorder = Recorder(job_id, 1)
        await recorder.started({})
        await recorder.checkpoint(manifest(job_id, 10))

    run(story())
    with db.read() as session:
        saved = next(e for e in read_events(session, job_id) if e.type == event.CHECKPOINT)
    assert saved.data["ready"] is True


def test_a_reason_that_no_database_could_store_is_told_with_marks_in_its_place(db, job_id, serving):
    async def story():
        reason = "row 3 has 'a\x00b\ud83d' in config.datasetSource"
        return await Recorder(job_id, 1).failed(reason, None, {"reasons": [reason]})

    assert run(story()) is True
    with db.read() as session:
        preflight, failed = read_events(session, job_id)
        row = session.get(JobRow, job_id)
    assert row.error == failed.data["error"] == preflight.data["reasons"][0]
    assert row.error == "row 3 has 'a\ufffdb\ufffd' in config.datasetSource"


def test_a_job_does_not_wait_for_serving_for_ever(db, job_id, serving, recorded, monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_CHECKPOINT_READY_TIMEOUT_S", "0.05")
    monkeypatch.setattr(module, "SERVED_S", 0.1)
    serving.find_no_room()

    async def story():
        recorder = Recorder(job_id, 1)
        await recorder.started({})
        return await recorder.completed(manifest(job_id, 20, final=True), {})

    assert run(story()) is True
    with db.read() as session:
        row = session.get(JobRow, job_id)
        assert row.status == "failed"
        assert "is stored, but cannot be served: serving did not load it" in row.error
        assert "no node has a GPU" in row.error
        assert checkpoints.find(session, job_id, None) is not None, "its adapter stays"
    assert recorded.total(metrics.JOB_FAILURES, reason="unavailable") == 1


def test_a_checkpoint_that_could_not_be_loaded_says_what_serving_waits_for(db, job_id, serving, monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_CHECKPOINT_READY_TIMEOUT_S", "0.05")
    serving.find_no_room()

    async def story():
        recorder = Recorder(job_id, 1)
        await recorder.started({})
        await recorder.checkpoint(manifest(job_id, 10))

    run(story())
    (reason,) = reasons(db, job_id, event.CHECKPOINT)
    assert "no node has a GPU" in reason and reason.endswith("the first request will")


def test_a_final_adapter_that_serving_refuses_fails_the_job(db, job_id, serving):
    serving.refuse()

    async def story():
        recorder = Recorder(job_id, 1)
        await recorder.started({})
        await recorder.checkpoint(manifest(job_id, 20))
        return await recorder.completed(manifest(job_id, 20, final=True), {})

    assert run(story()) is True
    with db.read() as session:
        row = session.get(JobRow, job_id)
        assert row.status == "failed"
        assert "rank too large" in row.error
        saved = next(e for e in read_events(session, job_id) if e.type == event.CHECKPOINT)
    assert saved.data["ready"] is False
    assert saved.data["reason"] == "rank too large"
    assert "refused" not in saved.data


def test_what_was_wrong_with_the_data_is_told_before_the_end(db, job_id, serving):
    async def story():
        return await Recorder(job_id, 1).failed("no usable row", None, {"rejected_rows": 3})

    assert run(story()) is True
    assert [type for type, _ in told(db, job_id)] == ["dataset.preflight", event.FAILED]


def test_a_recorder_of_a_lost_attempt_writes_nothing_and_says_stop(db, job_id, serving):
    async def story():
        lost = Recorder(job_id, 1)
        await lost.started({})
        with db.write() as session:
            counts = {"retries": 1, "forgotten": 0, "lost_at_step": None}
            jobs.plan_retry(session, job_id, attempt=1, retry_at=utcnow(), **counts)
            assert jobs.claim_attempt(session, job_id, attempt=2, submission_id="s-2")
        return await lost.tell([("log", ({"step": 1, "loss": 1.0},))]), await lost.should_stop()

    assert run(story()) == (False, True)
    assert told(db, job_id) == [(event.STARTED, None)]


def test_what_it_does_is_counted_under_the_name_in_the_catalogue(db, job_id, serving, recorded, monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_MODELS", "house=a/b")

    async def story():
        recorder = Recorder(job_id, 1)
        for _ in range(3):  # two of them after a worker had died
            await recorder.started({"model": "House"})
        for _ in range(2):  # told again after the restart
            await recorder.checkpoint(manifest(job_id, 10) | {"base_model": "a/b"})
        return await recorder.completed(manifest(job_id, 20, final=True) | {"base_model": "a/b"}, {})

    assert run(story()) is True
    assert recorded.total(metrics.TRAINING_WORKER_RESTARTS, base_model="house") == 2
    assert len(recorded.all(metrics.TRAINING_CHECKPOINT_SECONDS, base_model="house", stage="announce")) == 2


def test_a_refused_final_adapter_is_a_failure_of_that_kind(db, job_id, serving, recorded):
    serving.refuse()

    async def story():
        recorder = Recorder(job_id, 1)
        await recorder.started({})
        return await recorder.completed(manifest(job_id, 20, final=True), {})

    assert run(story()) is True
    assert recorded.total(metrics.JOB_FAILURES, reason="adapter_invalid") == 1


def signs_of(db, job_id):
    with db.read() as session:
        return leases.renewals(session, [f"{job_id}-1"])


def test_every_beat_is_a_later_sign_of_life(db, job_id):
    async def run():
        recorder = Recorder(job_id, 1)
        await recorder.beat()
        first = signs_of(db, job_id)
        await recorder.beat()
        return first, signs_of(db, job_id)

    first, second = asyncio.run(run())
    assert second[f"{job_id}-1"] > first[f"{job_id}-1"]


def test_an_attempt_that_is_no_longer_the_newest_gives_no_sign_of_life(db, job_id):
    with db.write() as session:
        jobs.claim_attempt(session, job_id, attempt=2, submission_id="s2")
    asyncio.run(Recorder(job_id, 1).beat())
    assert signs_of(db, job_id) == {}
