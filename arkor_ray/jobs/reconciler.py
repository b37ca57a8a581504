"""One turn of the loop that carries jobs through their life.

Nothing it remembers matters: each turn reads the database, asks Ray about each open job's submission, lets
`decision.decide` say what to do, and does it. It also starts the serving application of a job's base model, so that it is up
before the first checkpoint.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from datetime import datetime

from arkor_ray.db import checkpoints, jobs, leases, runs
from arkor_ray.db.checkpoints import Progress
from arkor_ray.db.session import Database
from arkor_ray.db.tables import JobRow
from arkor_ray.events import publisher
from arkor_ray.jobs import decision
from arkor_ray.jobs.decision import SubmissionState
from arkor_ray.jobs.job_figures import JobFigures
from arkor_ray.jobs.launcher import Launcher, submission_id
from arkor_ray.jobs.room import RoomWatch, WorkerGroup
from arkor_ray.jobs.serving_applications import ServingApplications
from arkor_ray.jobs.silence import SilenceWatch
from arkor_ray.jobs.storage_sweep import StorageSweep
from arkor_ray.schemas import event
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.job import JobConfig, JobStatus
from arkor_ray.settings import Settings
from arkor_ray.telemetry import tracing
from arkor_ray.telemetry.metrics import (
    CONTROLLER_LEADER,
    CONTROLLER_TURN_SECONDS,
    JOB_ATTEMPTS,
    JOB_FAILURES,
    JOB_RETRIES,
)

logger = logging.getLogger(__name__)

LEASE = "controller"
LEASE_S = 5.0
WORKERS_S = 10.0  # how often workers are looked for, those of lost attempts and those that find no room
SWEEP_S = 60.0  # how often stored runs are swept
SWEPT_RUNS = 1000  # in one turn; where there are more, the next turn goes on


class Reconciler:
    """One turn of the loop at a time, against any Launcher; the actor of `controller.py` turns it for ever."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        launcher: Launcher,
        serving: ServingApplications | None = None,
        storage_sweep: StorageSweep | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._db = db
        self._storage_sweep = storage_sweep
        self._launcher = launcher
        self._serving = serving
        self._holder = str(uuid.uuid4())
        self._limits = decision.Limits(settings.job_max_retries, settings.cancel_grace_s)
        self._clock = clock
        self._renewed_at = 0.0
        self._watch = SilenceWatch(settings.job_silence_timeout_s, clock)
        self._next_sweep = 0.0
        self._room = RoomWatch(db, launcher.room, clock)
        self._pending: dict[str, WorkerGroup] = {}  # drivers that Ray has no node for yet
        self._figures = JobFigures(db)
        self._next_workers = 0.0

    def turn(self) -> bool:
        """Looks once at every launched job, and at as many of those that wait as there are places.

        False if another controller holds the lease, also if it took it meanwhile.
        """
        if not self._leads():
            return False
        began = time.monotonic()
        with self._db.read() as session:
            launched = jobs.launched(session)
            submissions = [job.submission_id for job in launched if job.submission_id is not None]
            signs = leases.renewals(session, submissions)
            progress = checkpoints.progress(session, [job.id for job in launched if job.submission_id is not None])
            # A job whose final adapter is stored trains no more; however long serving keeps it, others may.
            trained = {job_id for job_id, reached in progress.items() if reached.final}
            free = self._settings.max_running_jobs - sum(
                not JobStatus(job.status).is_terminal and job.id not in trained for job in launched
            )
            waiting = jobs.to_launch(session, utcnow(), free) if free > 0 else []
        open_jobs = [*launched, *waiting]
        self._figures.look(open_jobs, utcnow())
        self._watch.begin_turn()
        self._pending.clear()
        for job in open_jobs:
            if not self._still_leads():
                return False
            try:
                self._advance(job, progress.get(job.id), signs=signs)
            except Exception:  # whatever is wrong with one job must not keep the others waiting
                logger.exception("Job %s: could not be advanced; the next turn tries again", job.id)
        if self._storage_sweep is not None:
            self._storage_sweep.tick()
        self._look_at_workers()
        self._sweep_runs()
        self._watch.end_turn()
        CONTROLLER_TURN_SECONDS.observe(time.monotonic() - began)
        return True

    def _leads(self) -> bool:
        """Takes or renews the lease."""
        with self._db.write() as session:
            leads = leases.hold(session, LEASE, self._holder, LEASE_S)
        self._renewed_at = self._clock()
        CONTROLLER_LEADER.set(int(leads))
        if not leads:
            self._figures.forget()
        return leads

    def _still_leads(self) -> bool:
        """Within a turn, which may outlast the lease by far: a single call to Ray may."""
        return self._clock() - self._renewed_at < LEASE_S / 3 or self._leads()

    def release(self) -> None:
        with self._db.write() as session:
            leases.release(session, LEASE, self._holder)

    def _advance(self, job: JobRow, progress: Progress | None, *, signs: dict[str, datetime]) -> None:
        """Does what `decide` says. `signs`: of life, by submission."""
        state, detail = SubmissionState.MISSING, ""
        if job.submission_id is not None:
            state, detail = self._launcher.state(job.submission_id)
            if state is SubmissionState.PENDING:
                self._pending[job.submission_id] = self._launcher.driver_group(job.submission_id)
            if state is SubmissionState.RUNNING and self._watch.is_silent(
                job.submission_id, signs.get(job.submission_id)
            ):
                state = SubmissionState.SILENT
        action = decision.decide(_view(job, progress), state, utcnow(), self._limits, detail)
        match action:
            case decision.Launch(attempt):
                self._launch(job, attempt)
            case decision.Relaunch(retry_at, retries, forgotten, reason, stop):
                logger.warning("Job %s: %s; launching again", job.id, reason)
                JOB_RETRIES.add(state=state.value)
                if stop is not None:
                    self._try_to_stop(stop)
                with self._db.write() as session:
                    leases.forget(session, submission_id(job.id, job.attempt))
                    jobs.plan_retry(
                        session,
                        job.id,
                        attempt=job.attempt,
                        retry_at=retry_at,
                        retries=retries,
                        forgotten=forgotten,
                        lost_at_step=progress.step if progress is not None else None,
                    )
            case decision.GiveUp(error):
                JOB_FAILURES.add(reason="infrastructure")
                self._fail(job, error)
            case decision.Stop(submission):
                logger.warning("Job %s is %s; stopping its submission %s", job.id, job.status, submission)
                self._launcher.stop(submission)
            case decision.Settle():
                with self._db.write() as session:
                    leases.forget(session, submission_id(job.id, job.attempt))
                    jobs.mark_stopped(session, job.id)

    def _try_to_stop(self, submission: str) -> None:
        """What cannot be stopped, on a node that nobody reaches, can no longer write once the next attempt is claimed."""
        try:
            self._launcher.stop(submission)
        except (RuntimeError, OSError) as error:
            logger.warning("Submission %s could not be stopped: %s", submission, error)

    def _look_at_workers(self) -> None:
        """Takes back, now and then, the workers of attempts that are no more, and tells jobs whose workers find no room.

        Ray ends them with their driver. But a node that comes back after it was given up still runs for a moment, and Ray
        grants it what it asks for: workers that nobody will ever end, in the place of those of the next attempt.
        """
        now = time.monotonic()
        if now < self._next_workers:
            return
        self._next_workers = now + WORKERS_S
        try:
            groups = self._launcher.worker_groups()  # first: whoever has workers by now was claimed before we read on
        except (RuntimeError, OSError) as error:
            logger.warning("Ray does not say who has workers: %s", error)
            return
        with self._db.read() as session:
            launched = jobs.launched(session)
        current = {job.submission_id for job in launched}
        for name, group in groups.items():
            if group.submission not in current:
                logger.warning("Workers of %s, which is no more, are taken back", group.submission)
                self._launcher.remove_worker_group(name)
        try:
            self._room.look(launched, groups.values(), self._pending)
        except (RuntimeError, OSError) as error:
            logger.warning("Ray does not say what room there is: %s", error)

    def _sweep_runs(self) -> None:
        """Deletes runs that endpoints no longer keep, now and then."""
        now = time.monotonic()
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_S  # also when it fails: jobs come first
        with self._db.write() as session:
            swept = runs.sweep(session, utcnow(), SWEPT_RUNS)
        if swept == SWEPT_RUNS:
            self._next_sweep = now

    def _launch(self, job: JobRow, attempt: int) -> None:
        # The claim comes first: if we die after it, the next turn finds no such submission and launches attempt + 1.
        with self._db.write() as session:
            submission = submission_id(job.id, attempt)
            if not jobs.claim_attempt(session, job.id, attempt=attempt, submission_id=submission):
                return
            wire_config = jobs.config_of(session, job.id)
        logger.info("Job %s: launching attempt %d", job.id, attempt)
        JOB_ATTEMPTS.add()
        with tracing.span("launch attempt", parent=tracing.job_traceparent(job.id), arkor__attempt=attempt):
            self._launcher.submit(job.id, attempt, {})
        if self._serving is not None:
            config = JobConfig.parse(wire_config)
            precision = self._serving.precision_of(config)
            self._serving.prefetch(self._settings.resolve_model(config.model), precision)

    def _fail(self, job: JobRow, error: str) -> None:
        with self._db.write() as session:
            publisher.finish(
                session,
                job.id,
                JobStatus.FAILED,
                type=event.FAILED,
                fields={"error": error, "step": None},
                error=error,
                attempt=job.attempt,
            )


def _view(job: JobRow, progress: Progress | None) -> decision.JobView:
    return decision.JobView(
        id=job.id,
        status=JobStatus(job.status),
        attempt=job.attempt,
        submission_id=job.submission_id,
        retries=job.retries,
        forgotten=job.forgotten,
        progressed=progress is not None and (job.lost_at_step is None or progress.step > job.lost_at_step),
        retry_at=job.retry_at,
        completed_at=job.completed_at,
    )
