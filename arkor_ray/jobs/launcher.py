"""Talking to Ray Jobs: one submission per attempt of a job."""

from __future__ import annotations

import logging
import shlex
import sys
from typing import TYPE_CHECKING, Protocol

from arkor_ray.errors import ServiceUnavailableError
from arkor_ray.jobs.decision import SubmissionState
from arkor_ray.placement import nodes_for
from arkor_ray.settings import Settings

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

logger = logging.getLogger(__name__)

UNKNOWN_TO_RAY = "does not exist"  # what Ray Jobs says of a submission that it never had, or no longer has


def submission_id(job_id: str, attempt: int) -> str:
    return f"{job_id}-{attempt}"


class Launcher(Protocol):
    """What the controller needs of a place that runs drivers."""

    def submit(self, job_id: str, attempt: int, environment: dict[str, str]) -> None:
        """Starts the driver of an attempt; submitting the same attempt again changes nothing."""

    def state(self, submission: str) -> tuple[SubmissionState, str]:
        """The state of a submission and, when it is over, Ray's message."""

    def stop(self, submission: str) -> None:
        """Asks the driver to end (SIGTERM, then SIGKILL); returns at once."""

    def logs(self, submission: str) -> str | None:
        """What the driver printed so far; None if the submission is not known."""


class RayJobsLauncher:
    """Ray Jobs through its REST API, on the Ray that this process is connected to.

    Drivers run on the head node, or on nodes for training where nodes have roles: they need what training imports.
    """

    def __init__(self, settings: Settings) -> None:
        self._nodes = nodes_for(settings, "training")
        self._client = ray_jobs_client()

    def submit(self, job_id: str, attempt: int, environment: dict[str, str]) -> None:
        name = submission_id(job_id, attempt)
        # The interpreter by its path: the one of this environment, whatever PATH the raylet was started with.
        command = [sys.executable, "-m", "arkor_ray.training.main", "--job-id", job_id, "--attempt", str(attempt)]
        try:
            self._client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=name,
                runtime_env={"env_vars": environment} if environment else None,
                metadata={"arkor_job_id": job_id, "attempt": str(attempt)},
                entrypoint_label_selector=self._nodes or None,
            )
        except RuntimeError:
            if self.state(name)[0] in (SubmissionState.MISSING, SubmissionState.UNKNOWN):
                raise

    def state(self, submission: str) -> tuple[SubmissionState, str]:
        try:
            info = self._client.get_job_info(submission)
        except RuntimeError as error:
            if UNKNOWN_TO_RAY in str(error):
                return SubmissionState.MISSING, ""
            logger.warning("Ray Jobs did not answer for %s: %s", submission, error)
            return SubmissionState.UNKNOWN, str(error)
        except OSError as error:  # the REST API is restarting
            logger.warning("Ray Jobs is not reachable: %s", error)
            return SubmissionState.UNKNOWN, str(error)
        return SubmissionState(str(info.status.value).lower()), info.message or ""

    def stop(self, submission: str) -> None:
        self._client.stop_job(submission)

    def logs(self, submission: str) -> str | None:
        try:
            return self._client.get_job_logs(submission)
        except RuntimeError as error:
            if UNKNOWN_TO_RAY in str(error):
                return None
            raise ServiceUnavailableError(f"Ray Jobs does not give the log of {submission}", retry_after=1) from error
        except OSError as error:
            raise ServiceUnavailableError("Ray Jobs is not reachable", retry_after=1) from error


def ray_jobs_client() -> JobSubmissionClient:
    """Of the Ray that this process is connected to. Blocks on a request."""
    import ray
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(ray.get_runtime_context().gcs_address)
