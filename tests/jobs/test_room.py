"""Who waits for room and hears of it: a database, groups and a clock; no Ray."""

from __future__ import annotations

import pytest

from arkor_ray.db import jobs
from arkor_ray.events import publisher
from arkor_ray.events.stream import read_events
from arkor_ray.jobs.room import TOLD_AFTER_S, Room, RoomWatch, WorkerGroup, waiting_fields
from tests.db.factories import create_job

WORKER = {"GPU": 1.0, "CPU": 0.5}
ROOM = Room({"GPU": 2, "CPU": 8}, {"CPU": 6.5}, {"inference-a-1": {"GPU": 1, "CPU": 0.01}, "inference-b-2": {"GPU": 1}})


class Looking:
    """Turns the watch by hand: each `look` at these groups is ten seconds after the last."""

    def __init__(self, db, clock):
        self.db, self.clock = db, clock
        self.job_id = create_job(db)
        with db.write() as session:
            jobs.claim_attempt(session, self.job_id, attempt=1, submission_id=self.submission)
        self.restart()

    @property
    def submission(self):
        return f"{self.job_id}-1"

    def restart(self):
        self.watch = RoomWatch(self.db, lambda labels: ROOM, self.clock)

    def look(self, *groups, seconds=10.0):
        for _ in range(int(seconds // 10)):
            with self.db.read() as session:
                launched = jobs.launched(session)
            self.watch.look(launched, groups, {})
            self.clock.advance(10)

    def waits(self, seconds):
        self.look(WorkerGroup(self.submission, placed=False, workers=(WORKER,)), seconds=seconds)

    def told(self):
        with self.db.read() as session:
            return [e.type for e in read_events(session, self.job_id)]


@pytest.fixture
def looking(db, clock):
    return Looking(db, clock)


def test_it_is_told_once_and_only_after_a_while(looking):
    looking.waits(TOLD_AFTER_S)
    assert looking.told() == []
    looking.waits(100)
    assert looking.told() == ["resources.waiting"]


def test_the_moment_between_two_groups_does_not_begin_the_waiting_anew(looking):
    looking.waits(40)
    looking.look()
    looking.waits(30)
    assert looking.told() == ["resources.waiting"]


def test_after_a_restart_it_is_not_told_again(looking):
    looking.waits(100)
    looking.restart()
    looking.waits(100)
    assert looking.told() == ["resources.waiting"]


def test_who_waits_again_after_having_trained_is_told_again(looking):
    looking.waits(100)
    looking.look(WorkerGroup(looking.submission))
    with looking.db.write() as session:
        publisher.start(session, looking.job_id, {})
    looking.waits(TOLD_AFTER_S)
    assert looking.told() == ["resources.waiting", "training.started"]
    looking.waits(10)
    assert looking.told() == ["resources.waiting", "training.started", "resources.waiting"]


def test_groups_of_attempts_that_are_no_more_are_nobodys(looking):
    looking.look(WorkerGroup(f"{looking.job_id}-0", placed=False, workers=(WORKER,)), seconds=100)
    assert looking.told() == []


def test_what_is_wanted_there_and_free_and_what_serving_holds_is_told_with_the_remedy():
    fields = waiting_fields(WorkerGroup("job-1", placed=False, workers=(WORKER,) * 2), ROOM)
    assert fields["reason"] == (
        "Training waits for room: 2 workers want 1 GPU and 0.5 CPU each; the cluster has 2 GPU and 8 CPU, of which 0 GPU and "
        "6.5 CPU free. Serving holds inference-a-1 (1 GPU), inference-b-2 (1 GPU): the operator ends one that "
        "nobody uses with ray.serve.delete(NAME); it starts again when it is asked for."
    )
    assert (fields["workers"], fields["wanted"]) == (2, {"GPU": 2.0, "CPU": 1.0})
    assert (fields["total"], fields["free"]) == ({"GPU": 2, "CPU": 8}, {"GPU": 0.0, "CPU": 6.5})


def test_what_the_cluster_can_never_hold_is_told_as_such():
    group = WorkerGroup("job-1", placed=False, possible=False, workers=(WORKER,) * 3, labels={"role": "training"})
    said = str(waiting_fields(group, Room({"GPU": 2, "CPU": 8}, {"GPU": 2, "CPU": 8}))["reason"])
    assert "the nodes with role=training have 2 GPU" in said
    assert "even if nothing else ran" in said and "numWorkers" in said
    assert "Serving" not in said


def test_a_driver_that_waits_is_told_apart_from_workers():
    fields = waiting_fields(WorkerGroup("job-1", placed=False, workers=({"CPU": 0.01},)), Room({}, {}), driver=True)
    assert str(fields["reason"]).startswith("The job waits for room: its driver wants 0.01 CPU; the cluster has 0 CPU")
    assert fields["workers"] == 0
