"""Which serving applications the controller starts, and which it finds there: also those that `serve deploy` brought."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from ray import serve
from ray.serve.schema import ApplicationStatus

from arkor_ray.errors import ModelError, ServiceUnavailableError
from arkor_ray.jobs import serving_applications as module
from arkor_ray.jobs.serving_applications import ServingApplications
from arkor_ray.serving.app import application_name
from arkor_ray.settings import Settings

BASE, PRECISION = "a/b", "fp32"
NAME = application_name(BASE, PRECISION)
NO_ROOM = "Resources required for each replica: {'GPU': 1}, total resources available: {}."


class FakeServe:
    """Says of an application what it is told to, one status after the other; what is deployed runs, unless there is `no_room`
    for it or it `breaks`."""

    def __init__(self) -> None:
        self.statuses: dict[str, list[ApplicationStatus]] = {}
        self.started: list[str] = []
        self.message = ""
        self.deployed_as = ApplicationStatus.RUNNING
        self.answers = threading.Event()
        self.answers.set()

    def no_room(self) -> None:
        self.deployed_as, self.message = ApplicationStatus.DEPLOYING, NO_ROOM

    def breaks(self, message: str) -> None:
        self.deployed_as, self.message = ApplicationStatus.DEPLOY_FAILED, message

    def all_run(self) -> None:
        self.statuses = {name: [ApplicationStatus.RUNNING] for name in self.statuses}

    def status(self) -> SimpleNamespace:
        assert self.answers.wait(20)
        return SimpleNamespace(applications={name: self._overview(told) for name, told in self.statuses.items()})

    def run_many(self, targets: list[serve.RunTarget], *, wait_for_applications_running: bool) -> None:
        assert not wait_for_applications_running, "Serve would wait without a limit"
        for target in targets:
            self.started.append(target.name)
            self.statuses[target.name] = [self.deployed_as]

    def _overview(self, told: list[ApplicationStatus]) -> SimpleNamespace:
        status = told.pop(0) if len(told) > 1 else told[0]
        return SimpleNamespace(
            status=status, message="", deployments={"LLMServer": SimpleNamespace(message=self.message)}
        )


@pytest.fixture
def fake_serve(monkeypatch):
    fake = FakeServe()
    monkeypatch.setattr(serve, "status", fake.status)
    monkeypatch.setattr(serve, "run_many", fake.run_many)
    monkeypatch.setattr(module, "ANSWER_S", 1.0)
    return fake


@pytest.fixture
def applications(fake_serve, tmp_path):
    """Whatever it watches still at the end runs then, so that no thread meets the Serve of another test."""
    applications = ServingApplications(Settings.load(data_dir=tmp_path))
    yield applications
    fake_serve.all_run()
    for start in applications._starts.values():
        start.ended.exception(timeout=20)


def test_an_application_that_runs_is_left_alone_whoever_deployed_it(fake_serve, applications):
    fake_serve.statuses[NAME] = [ApplicationStatus.RUNNING]
    assert applications.ensure(BASE, PRECISION) is None
    assert fake_serve.started == []


def test_one_that_is_being_deployed_is_waited_for(fake_serve, applications):
    fake_serve.statuses[NAME] = [ApplicationStatus.DEPLOYING, ApplicationStatus.DEPLOYING, ApplicationStatus.RUNNING]
    applications.ensure(BASE, PRECISION)
    assert applications.ensure(BASE, PRECISION) is None
    assert fake_serve.started == []


@pytest.mark.parametrize("status", [None, ApplicationStatus.DEPLOY_FAILED], ids=["absent", "failed"])
def test_one_that_is_not_there_is_started_under_the_name_that_a_config_would_give_it(fake_serve, applications, status):
    if status is not None:
        fake_serve.statuses[NAME] = [status]
    assert applications.ensure(BASE, PRECISION) is None
    assert fake_serve.started == [NAME]


def test_one_that_finds_no_room_keeps_nobody_and_says_what_it_waits_for(fake_serve, applications):
    fake_serve.no_room()
    assert NO_ROOM in applications.ensure(BASE, PRECISION)
    assert NO_ROOM in applications.ensure(BASE, PRECISION)
    assert fake_serve.started == [NAME], "Serve goes on with it; deploying it anew would begin from the start"


def test_however_many_find_no_room_the_next_base_model_starts(fake_serve, applications):
    fake_serve.no_room()
    for base in range(20):
        applications.prefetch(f"too/large-{base}", PRECISION)
    deadline = time.monotonic() + 20
    while len(fake_serve.started) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(fake_serve.started) == 20
    fake_serve.deployed_as = ApplicationStatus.RUNNING
    assert applications.ensure(BASE, PRECISION) is None
    assert fake_serve.started[-1] == NAME


def test_a_serve_that_does_not_answer_keeps_nobody(fake_serve, applications):
    fake_serve.answers.clear()
    try:
        assert "does not say" in applications.ensure(BASE, PRECISION)
    finally:
        fake_serve.answers.set()


@pytest.mark.parametrize(
    ("message", "raised"), [("out of memory", ServiceUnavailableError), ("ModelError: no such revision", ModelError)]
)
def test_one_that_serve_gives_up_is_told_with_its_reason(fake_serve, applications, message, raised):
    fake_serve.breaks(message)
    with pytest.raises(raised, match=message):
        for _ in range(20):
            applications.ensure(BASE, PRECISION)


def test_one_that_is_watched_no_more_is_looked_at_again_by_the_next_to_ask(fake_serve, applications, monkeypatch):
    monkeypatch.setattr(module, "WATCH_S", 0.0)
    fake_serve.no_room()
    for _ in range(3):
        assert NO_ROOM in applications.ensure(BASE, PRECISION), "a base model may take long to load: that is no failure"
    fake_serve.statuses[NAME] = [ApplicationStatus.RUNNING]
    assert applications.ensure(BASE, PRECISION) is None
    assert fake_serve.started == [NAME]
