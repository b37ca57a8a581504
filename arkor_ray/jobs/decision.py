"""What to do next for one job: a pure function of what the database says and what Ray says."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from arkor_ray.errors import last_line
from arkor_ray.schemas.job import JobStatus

BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
FREE_LOSSES = 3  # attempts in a row that Ray may forget; a job that goes on being forgotten is what ends Ray


class SubmissionState(StrEnum):
    """A submission as Ray Jobs tells it, and the answers that Ray cannot give."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    MISSING = "missing"
    """Ray does not know it: it was never submitted, or the Ray head that knew it is gone."""
    UNPLACED = "unplaced"
    """Ray gave it up before it began: no node had room for its driver in time."""
    UNKNOWN = "unknown"
    """Ray did not answer; nothing may be concluded."""
    SILENT = "silent"
    """Ray takes it for running, but it has given no sign of life for too long."""

    @property
    def is_over(self) -> bool:
        return self in (
            SubmissionState.SUCCEEDED,
            SubmissionState.FAILED,
            SubmissionState.STOPPED,
            SubmissionState.MISSING,
            SubmissionState.UNPLACED,
        )


@dataclass(frozen=True)
class JobView:
    """The facts about a job that decide its next step.

    `retries` counts the losses that were charged, `forgotten` those in a row that were due to Ray having no such submission;
    `progressed`: a checkpoint is newer than the last of them.
    """

    id: str
    status: JobStatus
    attempt: int = 0
    submission_id: str | None = None
    retries: int = 0
    forgotten: int = 0
    progressed: bool = False
    retry_at: datetime | None = None
    completed_at: datetime | None = None


@dataclass(frozen=True)
class Limits:
    max_retries: int = 5
    cancel_grace_s: float = 20.0


@dataclass(frozen=True)
class Wait:
    """Nothing to do now."""


@dataclass(frozen=True)
class Launch:
    """Claim the next attempt and submit it, if a place is free."""

    attempt: int


@dataclass(frozen=True)
class Relaunch:
    """The attempt is lost: forget its submission and launch again at `retry_at`.

    `retries` and `forgotten`: the job's counts from now on. `stop`: the submission to end first, where Ray does not know
    that it is lost.
    """

    retry_at: datetime
    retries: int
    forgotten: int
    reason: str
    stop: str | None = None


@dataclass(frozen=True)
class GiveUp:
    """The budget for infrastructure failures is spent: the job has failed."""

    error: str


@dataclass(frozen=True)
class Stop:
    """The job has ended but its submission still runs after its time to stop by itself: end it."""

    submission_id: str


@dataclass(frozen=True)
class Settle:
    """The job has ended and so has its submission: nothing is left to do for it, ever."""


Action = Wait | Launch | Relaunch | GiveUp | Stop | Settle


def decide(job: JobView, submission: SubmissionState, now: datetime, limits: Limits, detail: str = "") -> Action:
    """The next action for `job`, whose current submission is in state `submission` (`detail`: Ray's own message).

    A driver writes its own final word (completed, failed) into the database. So a submission that is over while its job is
    not was lost to infrastructure, whatever its exit code says.
    """
    if job.status.is_terminal:
        return _after_the_end(job, submission, now, limits)
    if job.submission_id is None:
        return Launch(job.attempt + 1) if job.retry_at is None or job.retry_at <= now else Wait()
    if not submission.is_over and submission is not SubmissionState.SILENT:
        return Wait()
    return _after_a_loss(job, submission, now, limits, detail)


def _after_a_loss(job: JobView, submission: SubmissionState, now: datetime, limits: Limits, detail: str) -> Action:
    """Losses are counted together only while the job gets nowhere: one of many days on spot machines meets any number."""
    retries, forgotten = (0, 0) if job.progressed else (job.retries, job.forgotten)
    delay = timedelta(seconds=BACKOFF_S[min(retries + forgotten, len(BACKOFF_S) - 1)])
    if submission is SubmissionState.UNPLACED:  # Ray has taken its time: nobody's fault, and no reason to wait longer
        reason = f"no node had room for the driver of attempt {job.attempt}"
        return Relaunch(now + timedelta(seconds=BACKOFF_S[0]), retries, forgotten, reason)
    stop = None
    if submission is SubmissionState.MISSING:
        # Ray restarted, or we died between claiming the attempt and submitting it: no fault of a job, if it goes on then.
        reason = f"Ray does not know the submission of attempt {job.attempt}"
        forgotten += 1
        if forgotten <= FREE_LOSSES:
            return Relaunch(now + delay, retries, forgotten, reason)
        reason += f", nor any of the {forgotten - 1} before"
    elif submission is SubmissionState.SILENT:
        stop, reason, forgotten = job.submission_id, f"attempt {job.attempt} gave no sign of life any more", 0
    else:
        said = last_line(detail)
        reason = f"attempt {job.attempt} ended as {submission.value} without a result" + (said and f": {said}")
        forgotten = 0
    if retries >= limits.max_retries:
        return GiveUp(f"Lost to infrastructure {retries + 1} times without getting further; {reason}")
    return Relaunch(now + delay, retries + 1, forgotten, reason, stop)


def _after_the_end(job: JobView, submission: SubmissionState, now: datetime, limits: Limits) -> Action:
    if job.submission_id is None or submission.is_over:
        return Settle()
    if submission is SubmissionState.UNKNOWN:
        return Wait()
    grace_over = job.completed_at is None or now - job.completed_at > timedelta(seconds=limits.cancel_grace_s)
    return Stop(job.submission_id) if grace_over else Wait()
