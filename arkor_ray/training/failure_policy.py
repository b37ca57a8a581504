"""Which errors of a worker end the run at once.

Apart from `trainer`, because Ray Train's controller loads this and needs no torch.
"""

from __future__ import annotations

import ray.exceptions
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from arkor_ray.errors import ArkorError, InvalidRequestError, TrainingError

# What another attempt cannot mend: the user must change something, or training has diverged.
FINAL_ERRORS = (InvalidRequestError, TrainingError)


class FinalErrorsEndTheRun(FailurePolicy):
    """Ray Train's own policy retries whatever a worker raises."""

    def __init__(self, usual: FailurePolicy) -> None:
        super().__init__(usual.failure_config)
        self._usual = usual

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if final_error(training_failed_error) is not None:
            return FailureDecision.RAISE
        return self._usual.make_decision(training_failed_error)


def final_error(error: TrainingFailedError) -> ArkorError | None:
    """The error of a worker for which there is no use in trying again, if that is what ended the run."""
    failures: list[BaseException] = []
    if isinstance(error, WorkerGroupError):
        failures = list(error.worker_failures.values())
    elif isinstance(
        error, ControllerError
    ):  # also what a worker raises where the group meets, before the train function
        failures = [error.controller_failure]
    for failure in failures:
        cause = getattr(failure, "_base_exc", failure)  # Ray Train wraps what a train function raises
        if isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, FINAL_ERRORS):
            return cause
    return None
