"""The controller's decisions, case by case: no database, no Ray, no clock."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from arkor_ray.jobs.decision import (
    BACKOFF_S,
    FREE_LOSSES,
    GiveUp,
    JobView,
    Launch,
    Limits,
    Relaunch,
    Settle,
    Stop,
    SubmissionState,
    Wait,
    decide,
)
from arkor_ray.schemas.job import JobStatus

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LIMITS = Limits(max_retries=2, cancel_grace_s=20)
QUEUED = JobView("job", JobStatus.QUEUED)
RUNNING = JobView("job", JobStatus.RUNNING, attempt=1, submission_id="job-1")
CANCELLED = replace(RUNNING, status=JobStatus.CANCELLED, completed_at=NOW - timedelta(seconds=5))
ENDED = [SubmissionState.SUCCEEDED, SubmissionState.FAILED, SubmissionState.STOPPED]


def test_a_new_job_is_launched():
    assert decide(QUEUED, SubmissionState.MISSING, NOW, LIMITS) == Launch(1)


def test_a_planned_retry_waits_for_its_time():
    planned = replace(RUNNING, submission_id=None, retry_at=NOW + timedelta(seconds=1))
    assert decide(planned, SubmissionState.MISSING, NOW, LIMITS) == Wait()
    assert decide(planned, SubmissionState.MISSING, NOW + timedelta(seconds=1), LIMITS) == Launch(2)


@pytest.mark.parametrize("state", [SubmissionState.PENDING, SubmissionState.RUNNING, SubmissionState.UNKNOWN])
def test_a_living_or_unknown_submission_is_left_alone(state):
    assert decide(RUNNING, state, NOW, LIMITS) == Wait()


def test_a_silent_attempt_is_stopped_charged_and_launched_again():
    action = decide(RUNNING, SubmissionState.SILENT, NOW, LIMITS)
    assert isinstance(action, Relaunch)
    assert action.retries == 1
    assert action.stop == "job-1"
    assert isinstance(decide(replace(RUNNING, retries=2), SubmissionState.SILENT, NOW, LIMITS), GiveUp)


def test_an_ended_job_whose_submission_is_silent_is_stopped_once_its_grace_is_over():
    assert decide(CANCELLED, SubmissionState.SILENT, NOW, LIMITS) == Wait()
    assert decide(CANCELLED, SubmissionState.SILENT, NOW + timedelta(seconds=20), LIMITS) == Stop("job-1")


def test_a_submission_ray_forgot_is_launched_again_without_charge():
    action = decide(replace(RUNNING, retries=99), SubmissionState.MISSING, NOW, LIMITS)
    assert isinstance(action, Relaunch)
    assert action.retries == 99


def lose(
    job: JobView, *states: SubmissionState, progressed: bool = False
) -> tuple[JobView, list[float], GiveUp | None]:
    """The job after these losses, each with the delay before it is launched again, and its end if it came."""
    delays = []
    for state in states:
        action = decide(replace(job, progressed=progressed), state, NOW, LIMITS)
        if isinstance(action, GiveUp):
            return job, delays, action
        assert isinstance(action, Relaunch)
        job = replace(job, retries=action.retries, forgotten=action.forgotten)
        delays.append((action.retry_at - NOW).total_seconds())
    return job, delays, None


def test_one_that_ray_forgets_time_after_time_is_charged_in_the_end_and_ever_more_seldom_launched():
    job, delays, end = lose(RUNNING, *[SubmissionState.MISSING] * 20)
    assert len(delays) == FREE_LOSSES + LIMITS.max_retries
    assert delays == sorted(delays) and delays[-1] > delays[0]
    assert end is not None and "does not know" in end.error
    assert job.retries == LIMITS.max_retries


def test_what_ray_forgot_in_a_row_is_forgotten_after_a_loss_of_another_kind():
    job, _, end = lose(
        RUNNING, SubmissionState.MISSING, SubmissionState.FAILED, *[SubmissionState.MISSING] * FREE_LOSSES
    )
    assert end is None
    assert job.retries == 1


def test_a_job_that_gets_further_each_time_may_be_lost_any_number_of_times():
    losses = [SubmissionState.FAILED, SubmissionState.SILENT, *[SubmissionState.MISSING] * 5] * 10
    _, delays, end = lose(RUNNING, *losses, progressed=True)
    assert end is None
    assert set(delays) == {BACKOFF_S[0]}


def test_a_driver_for_which_no_node_had_room_costs_nothing():
    job, _, end = lose(replace(RUNNING, retries=2, forgotten=1), *[SubmissionState.UNPLACED] * 20)
    assert end is None
    assert (job.retries, job.forgotten) == (2, 1)


@pytest.mark.parametrize("state", ENDED)
def test_a_driver_that_ended_without_a_word_is_charged_and_launched_again(state):
    action = decide(RUNNING, state, NOW, LIMITS, "exit code 137")
    assert isinstance(action, Relaunch)
    assert action.retries == 1
    assert action.retry_at == NOW + timedelta(seconds=BACKOFF_S[0])
    assert "exit code 137" in action.reason


def test_retries_back_off_and_end():
    delays = []
    for retries in range(3):
        action = decide(replace(RUNNING, retries=retries), SubmissionState.FAILED, NOW, LIMITS, "killed")
        delays.append(action.retry_at - NOW if isinstance(action, Relaunch) else None)
    assert delays[0] < delays[1]
    assert delays[2] is None
    assert isinstance(action, GiveUp)
    assert "3 times" in action.error
    assert "killed" in action.error


def test_a_cancelled_job_gets_time_to_stop_by_itself_then_is_stopped():
    assert decide(CANCELLED, SubmissionState.RUNNING, NOW, LIMITS) == Wait()
    assert decide(CANCELLED, SubmissionState.RUNNING, NOW + timedelta(seconds=16), LIMITS) == Stop("job-1")


@pytest.mark.parametrize("state", [s for s in SubmissionState if s.is_over])
def test_an_ended_job_whose_submission_is_over_is_settled(state):
    assert decide(CANCELLED, state, NOW, LIMITS) == Settle()


def test_a_job_cancelled_before_its_launch_is_settled():
    cancelled = replace(QUEUED, status=JobStatus.CANCELLED, completed_at=NOW)
    assert decide(cancelled, SubmissionState.MISSING, NOW, LIMITS) == Settle()


def test_nothing_is_concluded_about_an_ended_job_while_ray_is_silent():
    assert decide(CANCELLED, SubmissionState.UNKNOWN, NOW + timedelta(hours=1), LIMITS) == Wait()
