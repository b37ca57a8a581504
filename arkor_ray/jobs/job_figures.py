"""What the controller's turns tell about all jobs, as metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime

from arkor_ray.db import jobs
from arkor_ray.db.session import Database
from arkor_ray.db.tables import JobRow
from arkor_ray.schemas.job import JobStatus
from arkor_ray.telemetry.metrics import JOBS, JOBS_OLDEST_QUEUED, JOBS_QUEUE_SECONDS

COUNT_S = 5.0  # how often all jobs are counted


class JobFigures:
    def __init__(self, db: Database) -> None:
        self._db = db
        self._queued: set[str] = set()  # jobs that the last turn saw queued
        self._next_count = 0.0

    def look(self, open_jobs: Iterable[JobRow], now: datetime) -> None:
        """Once a turn, with the jobs that were launched and those that are about to be."""
        queued: set[str] = set()
        for job in open_jobs:
            if job.status == JobStatus.QUEUED:
                queued.add(job.id)
            elif job.started_at is not None and job.id in self._queued:
                JOBS_QUEUE_SECONDS.observe((job.started_at - job.created_at).total_seconds())
        self._queued = queued
        self._count(now)

    def forget(self) -> None:
        """Another controller counts them now."""
        for gauge in (JOBS, JOBS_OLDEST_QUEUED):
            gauge.forget()
        self._queued = set()
        self._next_count = 0.0

    def _count(self, now: datetime) -> None:
        if time.monotonic() < self._next_count:
            return
        self._next_count = time.monotonic() + COUNT_S
        with self._db.read() as session:
            counts = jobs.count_by_status(session)
            oldest = jobs.oldest_queued(session)
        JOBS_OLDEST_QUEUED.set((now - (oldest or now)).total_seconds())
        for status in JobStatus:
            JOBS.set(counts.get(status.value, 0), status=status.value)
