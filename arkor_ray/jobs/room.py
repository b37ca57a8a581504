"""Which attempts find no room in the cluster, and the event that tells their users so.

Ray and Ray Train wait for room without a limit and without a word; nothing else would tell such a job from one that prepares
its data.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from arkor_ray.db.session import Database
from arkor_ray.db.tables import JobRow
from arkor_ray.events import publisher
from arkor_ray.events.stream import read_events
from arkor_ray.placement import HARDLY_A_CPU
from arkor_ray.schemas import event
from arkor_ray.schemas.job import JobStatus

logger = logging.getLogger(__name__)

TOLD_AFTER_S = 60.0

Resources = dict[str, float]  # as Ray names and counts them: {"CPU": 0.5, "GPU": 1.0}


@dataclass(frozen=True)
class WorkerGroup:
    """A placement group of a submission of ours: what its workers hold, or wait for.

    `possible`: false where Ray says that the cluster could not hold it even if nothing else ran.
    """

    submission: str
    placed: bool = True
    possible: bool = True
    workers: tuple[Resources, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)  # of the nodes that they may run on; empty: all


@dataclass(frozen=True)
class Room:
    """What nodes have and have left, and what each serving application holds of it, by the application's name."""

    total: Resources
    free: Resources
    serving: dict[str, Resources] = field(default_factory=dict)


class RoomWatch:
    """Looks now and then; tells each job once while it waits, however often Ray Train asks anew or the controller restarts.

    Args:
        room: what the nodes with these labels have. RuntimeError or OSError if Ray is away.
    """

    def __init__(
        self, db: Database, room: Callable[[dict[str, str]], Room], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._db = db
        self._room = room
        self._clock = clock
        self._since: dict[str, float] = {}  # by submission

    def look(self, jobs: Iterable[JobRow], groups: Collection[WorkerGroup], pending: Mapping[str, WorkerGroup]) -> None:
        """`pending`: drivers that Ray has no node for, by submission, as groups of their own."""
        current = {
            job.submission_id: job for job in jobs if job.submission_id and not JobStatus(job.status).is_terminal
        }
        placed = {group.submission for group in groups if group.placed}
        # Between two of Ray Train's groups there is none for a moment; that is no end of the waiting.
        self._since = {name: since for name, since in self._since.items() if name in current and name not in placed}
        waiting = {**pending, **{group.submission: group for group in groups if not group.placed}}
        for submission, group in waiting.items():
            if submission not in current or submission in placed:
                continue
            since = self._since.setdefault(submission, self._clock())
            if self._clock() - since >= TOLD_AFTER_S and not self._knows(current[submission].id):
                self._tell(current[submission], group, driver=submission in pending)

    def _knows(self, job_id: str) -> bool:
        """Whether that is the last that was heard of the job."""
        with self._db.read() as session:
            job = session.get_one(JobRow, job_id)
            return any(e.type == event.RESOURCES_WAITING for e in read_events(session, job_id, job.last_event - 1))

    def _tell(self, job: JobRow, group: WorkerGroup, *, driver: bool) -> None:
        fields = waiting_fields(group, self._room(group.labels), driver=driver)
        logger.warning("Job %s: %s", job.id, fields["reason"])
        key = f"{event.RESOURCES_WAITING}:{job.attempt}:{job.last_event}"
        try:
            with self._db.write() as session:
                publisher.append(session, job.id, event.RESOURCES_WAITING, fields, key=key, attempt=job.attempt)
        except (publisher.JobEndedError, publisher.StaleAttemptError):
            logger.info("Job %s waits no more", job.id)


def waiting_fields(group: WorkerGroup, room: Room, *, driver: bool = False) -> dict[str, object]:
    """The fields of resources.waiting; only kinds of resources that are asked for are told."""
    asked = {kind: sum(worker.get(kind, 0) for worker in group.workers) for kind in _kinds(group)}
    total, free = ({kind: have.get(kind, 0.0) for kind in asked} for have in (room.total, room.free))
    scarce = {kind for kind in asked if free[kind] < asked[kind]}
    serving = {
        name: {kind: amount for kind, amount in held.items() if kind in asked and amount > HARDLY_A_CPU}
        for name, held in sorted(room.serving.items())
        if any(held.get(kind, 0) > HARDLY_A_CPU for kind in scarce)
    }
    nodes = " and ".join(f"{key}={value}" for key, value in group.labels.items())
    said = [
        f"{'The job' if driver else 'Training'} waits for room: {_who(group, driver)}; "
        f"{f'the nodes with {nodes} have' if nodes else 'the cluster has'} {_amounts(total)}, "
        f"of which {_amounts(free)} free."
    ]
    if not group.possible:
        fewer = (
            "" if driver or len(group.workers) == 1 else ", or the job is created anew with fewer workers (numWorkers)"
        )
        said.append(f"That is too little even if nothing else ran: it waits until nodes are added{fewer}.")
    if serving:
        held = ", ".join(f"{name} ({_amounts(held)})" for name, held in serving.items())
        said.append(
            f"Serving holds {held}: the operator ends one that nobody uses with ray.serve.delete(NAME); it starts again "
            "when it is asked for."
        )
    return {
        "reason": " ".join(said),
        "workers": 0 if driver else len(group.workers),
        "wanted": asked,
        "total": total,
        "free": free,
        "serving": serving,
    }


def _kinds(group: WorkerGroup) -> list[str]:
    return sorted({kind for worker in group.workers for kind in worker}, reverse=True)  # GPU before CPU


def _who(group: WorkerGroup, driver: bool) -> str:
    each = _amounts(group.workers[0]) if group.workers else "nothing"
    if driver:
        return f"its driver wants {each}"
    return f"1 worker wants {each}" if len(group.workers) == 1 else f"{len(group.workers)} workers want {each} each"


def _amounts(resources: Resources) -> str:
    return " and ".join(f"{resources[kind]:g} {kind}" for kind in sorted(resources, reverse=True)) or "nothing"
