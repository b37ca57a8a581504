"""The launcher against a Ray Jobs client that is told how to fail. What needs a real Ray is in tests/integration."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
import ray
from ray import job_submission
from ray.dashboard.modules.job.common import JobErrorType

from arkor_ray.jobs import launcher as module
from arkor_ray.jobs.decision import SubmissionState
from arkor_ray.jobs.launcher import RayJobsLauncher
from arkor_ray.placement import HARDLY_A_CPU
from arkor_ray.printed import KEPT_BYTES
from arkor_ray.settings import Settings

ONE_MACHINE = Settings.load()
CLUSTER = Settings.load(
    cluster=True, database_url="postgresql://arkor@db/arkor", storage_url="s3://arkor/jobs", node_roles=False
)
ROLES = CLUSTER.model_copy(update={"node_roles": True})


class FakeJobs:
    """What `ray.job_submission.JobSubmissionClient` is replaced with; counts how often it is made."""

    made: list[str] = []
    failure: Exception | None = None
    status, message, error_type = "RUNNING", None, None
    submitted: list[dict] = []

    def __init__(self, address):
        self.made.append(address)

    def get_job_info(self, submission):
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(
            status=SimpleNamespace(value=self.status), message=self.message, error_type=self.error_type
        )

    def submit_job(self, **arguments):
        self.submitted.append(arguments)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    fake = type("Jobs", (FakeJobs,), {"submitted": [], "made": []})
    monkeypatch.setattr(job_submission, "JobSubmissionClient", fake)
    return fake


@pytest.mark.parametrize("failure", [ConnectionError("refused"), TimeoutError("no answer"), RuntimeError("500")])
def test_a_ray_that_does_not_answer_says_nothing_about_the_submission(jobs, failure):
    jobs.failure = failure
    assert RayJobsLauncher(ONE_MACHINE).state("job-1")[0] is SubmissionState.UNKNOWN


def test_a_submission_that_ray_does_not_have_is_missing(jobs):
    jobs.failure = RuntimeError("Request failed with status code 404: Job job-1 does not exist.")
    assert RayJobsLauncher(ONE_MACHINE).state("job-1")[0] is SubmissionState.MISSING


def test_a_driver_that_no_node_had_room_for_is_told_from_one_that_failed(jobs):
    jobs.status, jobs.message = "FAILED", "failed to start within 900 seconds"
    assert RayJobsLauncher(ONE_MACHINE).state("job-1")[0] is SubmissionState.FAILED
    jobs.error_type = JobErrorType.JOB_SUPERVISOR_ACTOR_START_TIMEOUT.value
    assert RayJobsLauncher(ONE_MACHINE).state("job-1")[0] is SubmissionState.UNPLACED


def test_after_many_failures_the_address_is_looked_up_anew(jobs):
    launcher = RayJobsLauncher(ONE_MACHINE)
    jobs.failure = ConnectionError("refused")
    for _ in range(module.FAILURES):
        launcher.state("job-1")
    assert len(jobs.made) == 1
    jobs.failure = None
    assert launcher.state("job-1")[0] is SubmissionState.RUNNING
    assert len(jobs.made) == 2


def test_of_a_long_log_the_newest_megabytes_are_handed_on(jobs, monkeypatch):
    printed = "a line of é\n" * 1_000_000
    monkeypatch.setattr(jobs, "get_job_logs", lambda self, submission: printed, raising=False)
    told = RayJobsLauncher(ONE_MACHINE).logs("job-1")
    assert told.startswith("... the first ") and len(told.encode()) < KEPT_BYTES + 100
    assert told.partition("\n")[2] in printed and told.endswith(printed[-1000:])


def test_a_submission_whose_answer_was_lost_counts_if_ray_has_it(jobs, monkeypatch):
    launcher = RayJobsLauncher(ONE_MACHINE)
    monkeypatch.setattr(jobs, "submit_job", lambda self, **_: (_ for _ in ()).throw(TimeoutError("no answer")))
    launcher.submit("job", 1, {})


def test_drivers_of_a_cluster_take_a_little_cpu_and_so_stay_off_its_head(jobs):
    RayJobsLauncher(CLUSTER).submit("job", 1, {})
    RayJobsLauncher(ONE_MACHINE).submit("job", 1, {})
    assert [each["entrypoint_num_cpus"] for each in jobs.submitted] == [HARDLY_A_CPU, None]


def test_drivers_run_on_nodes_for_training_where_nodes_have_roles(jobs):
    for settings in (CLUSTER, ROLES):
        RayJobsLauncher(settings).submit("job", 1, {})
    assert [each["entrypoint_label_selector"] for each in jobs.submitted] == [None, {"arkor-ray/role": "training"}]


def test_a_ray_that_takes_the_connection_and_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "LIMITS_S", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        assert RayJobsLauncher(ONE_MACHINE).state("job-1")[0] is SubmissionState.UNKNOWN
