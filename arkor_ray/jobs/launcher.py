"""Talking to Ray Jobs: one submission per attempt of a job."""

from __future__ import annotations

import logging
import shlex
import sys
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Protocol, cast

from arkor_ray.errors import ServiceUnavailableError
from arkor_ray.jobs.decision import SubmissionState
from arkor_ray.jobs.room import Room, WorkerGroup
from arkor_ray.placement import HARDLY_A_CPU, nodes_for
from arkor_ray.printed import newest
from arkor_ray.settings import Settings

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from ray.util.state.common import PlacementGroupState

logger = logging.getLogger(__name__)

UNKNOWN_TO_RAY = "does not exist"  # what Ray Jobs says of a submission that it never had, or no longer has
NO_ROOM_IN_TIME = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"  # Ray's kind of failure after RAY_JOB_START_TIMEOUT_SECONDS
# To connect and to answer: Ray's client sets no limits, and a head that is cut off never answers.
LIMITS_S = (3.0, 20.0)
FAILURES = 20  # in a row, until the address is looked up anew: that takes a minute where there is no head to ask


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
        """The newest of what the driver printed so far; None if the submission is not known."""

    def worker_groups(self) -> dict[str, WorkerGroup]:
        """The placement groups of submissions of ours, by id. RuntimeError or OSError if Ray is away."""

    def remove_worker_group(self, group: str) -> None:
        """Frees what a placement group reserves, and ends what runs in it."""

    def driver_group(self, submission: str) -> WorkerGroup:
        """What the driver of a submission that is pending waits for."""

    def room(self, labels: dict[str, str]) -> Room:
        """What the living nodes with these labels have. RuntimeError or OSError if Ray is away."""


class RayJobsLauncher:
    """Ray Jobs through its REST API, on the Ray that this process is connected to.

    Drivers run on nodes with CPUs, or on those for training where nodes have roles: they need what training imports. Ray
    starts them on the head otherwise, and their attempts would be lost with it; but where there is only the head, a driver
    can use the worker processes that Ray keeps at hand.
    """

    def __init__(self, settings: Settings) -> None:
        self._driver_cpus = HARDLY_A_CPU if settings.cluster else None
        self._nodes = nodes_for(settings, "training")
        self._client: JobSubmissionClient | None = None
        self._failures = 0
        self._submissions: dict[str, str | None] = {}  # by the number of their drivers

    def submit(self, job_id: str, attempt: int, environment: dict[str, str]) -> None:
        name = submission_id(job_id, attempt)
        # The interpreter by its path: the one of this environment, whatever PATH the raylet was started with.
        command = [sys.executable, "-m", "arkor_ray.training.main", "--job-id", job_id, "--attempt", str(attempt)]
        try:
            self._connected().submit_job(
                entrypoint=shlex.join(command),
                submission_id=name,
                runtime_env={"env_vars": environment} if environment else None,
                metadata={"arkor_job_id": job_id, "attempt": str(attempt)},
                entrypoint_num_cpus=self._driver_cpus,
                entrypoint_label_selector=self._nodes or None,
            )
        except (RuntimeError, OSError):
            if self.state(name)[0] in (SubmissionState.MISSING, SubmissionState.UNKNOWN):
                raise

    def state(self, submission: str) -> tuple[SubmissionState, str]:
        try:
            info = self._connected().get_job_info(submission)
        except RuntimeError as error:
            if UNKNOWN_TO_RAY in str(error):
                return SubmissionState.MISSING, ""
            logger.warning("Ray Jobs did not answer for %s: %s", submission, error)
            return SubmissionState.UNKNOWN, str(error)
        except OSError as error:  # the REST API is restarting, perhaps at another address
            logger.warning("Ray Jobs is not reachable: %s", error)
            self._failures += 1
            if self._failures % FAILURES == 0:
                self._client = None
            return SubmissionState.UNKNOWN, str(error)
        self._failures = 0
        if info.error_type == NO_ROOM_IN_TIME:
            return SubmissionState.UNPLACED, info.message or ""
        return SubmissionState(str(info.status.value).lower()), info.message or ""

    def stop(self, submission: str) -> None:
        self._connected().stop_job(submission)

    def logs(self, submission: str) -> str | None:
        try:
            printed = self._connected().get_job_logs(submission).encode()
        except RuntimeError as error:
            if UNKNOWN_TO_RAY in str(error):
                return None
            raise ServiceUnavailableError(f"Ray Jobs does not give the log of {submission}", retry_after=1) from error
        except OSError as error:
            raise ServiceUnavailableError("Ray Jobs is not reachable", retry_after=1) from error
        return newest(printed).decode(errors="replace")

    def worker_groups(self) -> dict[str, WorkerGroup]:
        from ray.util.state import list_placement_groups
        from ray.util.state.exception import RayStateApiException

        address = self._connected().get_address()  # looking it up would take a minute where there is no head to ask
        living: Any = [("state", "!=", "REMOVED")]
        try:
            groups = list_placement_groups(address, filters=living, limit=10_000, timeout=int(LIMITS_S[1]), detail=True)
        except RayStateApiException as error:
            raise ConnectionError(str(error)) from error
        creators = {group.creator_job_id for group in groups}
        self._submissions = {c: self._submissions.get(c) or self._submission_of(c) for c in creators}
        return {
            group.placement_group_id: _worker_group(group, submission)
            for group in groups
            if (submission := self._submissions[group.creator_job_id]) is not None
        }

    def remove_worker_group(self, group: str) -> None:
        from ray import PlacementGroupID
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))

    def driver_group(self, submission: str) -> WorkerGroup:
        wanted = {"CPU": self._driver_cpus} if self._driver_cpus else {}
        return WorkerGroup(submission, placed=False, workers=(wanted,), labels=self._nodes)

    def room(self, labels: dict[str, str]) -> Room:
        import ray
        from ray._private.state import available_resources_per_node
        from ray.util.state import list_actors
        from ray.util.state.exception import RayStateApiException

        address, living = self._connected().get_address(), cast("Any", [("state", "=", "ALIVE")])
        try:
            actors = list_actors(address, filters=living, limit=10_000, timeout=int(LIMITS_S[1]), detail=True)
            nodes, left = ray.nodes(), available_resources_per_node()
        except (RayStateApiException, ray.exceptions.RayError) as error:
            raise ConnectionError(str(error)) from error
        total, free, serving = Counter[str](), Counter[str](), defaultdict[str, Counter[str]](Counter)
        for node in nodes:
            if node["Alive"] and labels.items() <= node["Labels"].items():
                total.update(node["Resources"])
                free.update(left.get(node["NodeID"], {}))
        for actor in actors:
            kind, _, names = actor.class_name.partition(":")
            if kind == "ServeReplica":
                serving[names.partition(":")[0]].update(actor.required_resources or {})
        return Room(dict(total), dict(free), {name: dict(held) for name, held in serving.items()})

    def _submission_of(self, ray_job: str) -> str | None:
        """The submission that Ray knows by this number of its driver; None if it is not one of ours."""
        try:
            info = self._connected().get_job_info(ray_job)
        except RuntimeError as error:
            if UNKNOWN_TO_RAY not in str(error):
                raise
            return None
        return info.submission_id if "arkor_job_id" in (info.metadata or {}) else None

    def _connected(self) -> JobSubmissionClient:
        """Raises RuntimeError or ConnectionError while the REST API is away."""
        if self._client is None:
            self._client = ray_jobs_client()
        return self._client


def _worker_group(group: PlacementGroupState, submission: str) -> WorkerGroup:
    bundles = group.bundles or []
    return WorkerGroup(
        submission,
        placed=group.state != "PENDING",
        possible=(group.stats or {}).get("scheduling_state") != "INFEASIBLE",
        workers=tuple(bundle["unit_resources"] for bundle in bundles),
        labels=bundles[0].get("label_selector", {}) if bundles else {},
    )


def ray_jobs_client() -> JobSubmissionClient:
    """Of the Ray that this process is connected to. Blocks on a request; raises RuntimeError or ConnectionError while the
    REST API is away."""
    import ray
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": LIMITS_S, **arguments})

    return Client(ray.get_runtime_context().gcs_address)
