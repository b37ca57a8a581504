"""Which serving applications the controller starts, and which it finds there: also those that `serve deploy` brought."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray import serve
from ray.serve.schema import ApplicationStatus

from arkor_ray.jobs.serving_applications import ServingApplications
from arkor_ray.serving.app import application_name
from arkor_ray.settings import Settings

BASE, PRECISION = "a/b", "fp32"
NAME = application_name(BASE, PRECISION)


class FakeServe:
    """Says of the application what it is told to, one status after the other; `run` makes it run."""

    def __init__(self, *statuses: ApplicationStatus) -> None:
        self.statuses = list(statuses)
        self.started: list[str] = []

    def status(self) -> SimpleNamespace:
        if not self.statuses:
            return SimpleNamespace(applications={})
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return SimpleNamespace(applications={NAME: SimpleNamespace(status=status, message="")})

    def run(self, application: object, *, name: str, route_prefix: str | None) -> None:
        self.started.append(name)
        self.statuses = [ApplicationStatus.RUNNING]


@pytest.fixture
def start(monkeypatch, tmp_path):
    def start(*statuses: ApplicationStatus) -> list[str]:
        fake = FakeServe(*statuses)
        monkeypatch.setattr(serve, "status", fake.status)
        monkeypatch.setattr(serve, "run", fake.run)
        ServingApplications(Settings.load(data_dir=tmp_path)).ensure(BASE, PRECISION)
        return fake.started

    return start


def test_an_application_that_runs_is_left_alone_whoever_deployed_it(start):
    assert start(ApplicationStatus.RUNNING) == []


def test_one_that_is_being_deployed_is_waited_for(start):
    assert start(ApplicationStatus.DEPLOYING, ApplicationStatus.DEPLOYING, ApplicationStatus.RUNNING) == []


@pytest.mark.parametrize("statuses", [(), (ApplicationStatus.DEPLOY_FAILED,)], ids=["absent", "failed"])
def test_one_that_is_not_there_is_started_under_the_name_that_a_config_would_give_it(start, statuses):
    assert start(*statuses) == [NAME]
