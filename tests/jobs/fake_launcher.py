"""A Ray and a clock that do what they are told, and what happens to jobs meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from arkor_ray.db.session import Database
from arkor_ray.db.tables import JobRow
from arkor_ray.events import publisher
from arkor_ray.jobs.decision import SubmissionState
from arkor_ray.jobs.launcher import submission_id
from arkor_ray.jobs.room import Room, WorkerGroup
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.job import JobStatus


@dataclass
class FakeLauncher:
    """A Ray that does what it is told: `die`, `forget_all`, `refusing`, `keep_waiting` for room; `place` them at last."""

    states: dict[str, SubmissionState] = field(default_factory=dict)
    submitted: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    groups: dict[str, WorkerGroup] = field(default_factory=dict)
    cluster: Room = field(default_factory=lambda: Room({"GPU": 4}, {}, {"inference-a-1": {"GPU": 1}}))
    refusing: bool = False

    def submit(self, job_id, attempt, environment):
        if self.refusing:
            raise RuntimeError("no agent")
        self.submitted.append(submission_id(job_id, attempt))
        self.states[submission_id(job_id, attempt)] = SubmissionState.RUNNING

    def state(self, submission):
        return self.states.get(submission, SubmissionState.MISSING), "message"

    def stop(self, submission):
        self.stopped.append(submission)
        self.states[submission] = SubmissionState.STOPPED

    def logs(self, submission):
        return ""

    def worker_groups(self):
        return dict(self.groups)

    def remove_worker_group(self, group):
        del self.groups[group]

    def driver_group(self, submission):
        return WorkerGroup(submission, placed=False, workers=({"CPU": 0.01},))

    def room(self, labels):
        return self.cluster

    def keep_waiting(self, submission, **of_the_group):
        """As Ray Train does it: each time with another group."""
        workers = ({"GPU": 1.0, "CPU": 0.5},) * 2
        self.groups = {f"group-{len(self.groups)}": WorkerGroup(submission, False, workers=workers, **of_the_group)}

    def place(self, submission):
        self.groups = {"placed": WorkerGroup(submission)}

    def die(self, submission):
        self.states[submission] = SubmissionState.FAILED

    def forget_all(self):
        self.states.clear()


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


def due_now(db: Database, job_id: str) -> None:
    due_in(db, job_id, timedelta())


def due_in(db: Database, job_id: str, wait: timedelta) -> None:
    with db.write() as session:
        session.get(JobRow, job_id).retry_at = utcnow() + wait


def finish(db: Database, job_id: str, status: JobStatus) -> None:
    with db.write() as session:
        assert publisher.finish(session, job_id, status, type=f"training.{status.value}", fields={})
