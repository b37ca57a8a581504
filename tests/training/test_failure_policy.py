from __future__ import annotations

import pytest
from ray.exceptions import RayTaskError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from arkor_ray.errors import DatasetError, ModelError, ServiceUnavailableError, TrainingError
from arkor_ray.training.failure_policy import FinalErrorsEndTheRun, final_error


def raised_by_worker(error: Exception) -> WorkerGroupError:
    return WorkerGroupError("a worker failed", {1: UserExceptionWithTraceback(error, "traceback")})


def decide(error: TrainingFailedError, max_failures: int = 3) -> FailureDecision:
    policy = FinalErrorsEndTheRun(DefaultFailurePolicy(FailureConfig(max_failures=max_failures)))
    return policy.make_decision(error)


@pytest.mark.parametrize(
    "error", [DatasetError("no rows"), ModelError("no weights"), TrainingError("diverged", step=3)]
)
def test_final_errors_are_raised_as_they_were(error) -> None:
    assert decide(raised_by_worker(error)) is FailureDecision.RAISE
    assert final_error(raised_by_worker(error)) is error


@pytest.mark.parametrize("error", [RuntimeError("connection reset"), ServiceUnavailableError("the Hub is away")])
def test_others_are_tried_again_within_the_budget(error) -> None:
    assert decide(raised_by_worker(error)) is FailureDecision.RETRY
    assert decide(raised_by_worker(error), max_failures=0) is FailureDecision.RAISE
    assert final_error(raised_by_worker(error)) is None


def test_what_a_worker_raises_where_the_group_meets_is_its_error_too() -> None:
    """Ray Train calls that an error of its controller."""
    error = TrainingError("this torch is the build for CPUs")
    met = ControllerError(RayTaskError("_join", "traceback", error).as_instanceof_cause())
    assert decide(met) is FailureDecision.RAISE
    assert final_error(met) is error
    assert final_error(ControllerError(RuntimeError("no room"))) is None


def test_a_final_error_counts_among_others() -> None:
    """When one worker fails for good, its peers lose their connections."""
    failures = {
        0: UserExceptionWithTraceback(RuntimeError("connection reset"), ""),
        1: UserExceptionWithTraceback(ModelError("no weights"), ""),
    }
    assert decide(WorkerGroupError("two workers failed", failures)) is FailureDecision.RAISE
