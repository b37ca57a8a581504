"""Processes of a running service are killed in the middle of jobs: nothing acknowledged is lost, nothing happens twice."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from arkor_ray.demo.testing import make_tiny_model
from arkor_ray.schemas import event
from tests.integration.stories import (
    SAVE_EVERY,
    STEPS,
    ask,
    assert_checkpoints_answer,
    assert_whole,
    config,
    losses,
    saved_steps,
)
from tests.servers.arkor import PARTS, Follower, RunningService, wait_for
from tests.servers.faulty_proxy import FaultyProxy

pytestmark = [pytest.mark.integration, pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), family="llama", hidden=64, layers=4)


@pytest.fixture(scope="module")
def service(tmp_path_factory, tiny) -> Iterator[RunningService]:
    running = RunningService(tmp_path_factory.mktemp("faults"), models={"tiny": tiny})
    running.start()
    yield running
    running.crash()


@pytest.fixture(scope="module")
def undisturbed(client, rows):
    """The losses of the same job when nothing happens to it."""
    job = client.create_job("undisturbed", config(rows))
    events = Follower(client, job.id).join()
    assert_whole(events)
    return losses(events)


def assert_same_curve(events, undisturbed):
    assert losses(events) == pytest.approx(undisturbed, abs=1e-4)


# Two in a run, each at a moment of its own: every part dies once, and no test is only about one death.
@pytest.mark.parametrize("parts", [("api", "recorder"), ("controller", "replica"), ("driver", "worker")], ids="+".join)
def test_a_killed_process_costs_nothing(parts, service, client, rows, undisturbed):
    job = client.create_job(f"kill {parts}", config(rows))
    follower = Follower(client, job.id)
    # Between the first step and the last but one checkpoint, other moments in every run.
    moments = sorted(random.sample(range(1, STEPS - SAVE_EVERY), len(parts)))
    # The api comes last: until it is back, the follower cannot see when it is time for another.
    order = sorted(random.sample(parts, len(parts)), key=lambda part: part == "api")
    for part, after in zip(order, moments, strict=True):
        follower.wait_for(lambda e, after=after: e.type == event.LOG and e.data["step"] >= after)
        service.kill(part)
    events = follower.join()
    assert_whole(events)
    assert_same_curve(events, undisturbed)
    assert client.get_job(job.id).status == "completed"
    assert_checkpoints_answer(client, job.id, events)


def test_the_pairs_above_name_every_part():
    named = {"api", "recorder", "controller", "replica", "driver", "worker"}
    assert named == set(PARTS)


def test_a_job_accepted_just_before_everything_dies_is_not_lost(service, client, rows, undisturbed):
    job = client.create_job("accepted", config(rows))
    service.crash()
    service.start()
    events = Follower(client, job.id).join()
    assert_whole(events)
    assert_same_curve(events, undisturbed)


def test_a_job_resumes_when_the_whole_service_is_restarted(service, client, rows, undisturbed):
    job = client.create_job("restart", config(rows))
    follower = Follower(client, job.id)
    follower.wait_for(lambda e: e.type == event.CHECKPOINT)
    assert service.stop() == 0
    service.start()
    events = follower.join()
    assert_whole(events)
    assert_same_curve(events, undisturbed)
    assert_checkpoints_answer(client, job.id, events)


def test_cancel_stops_the_training_within_seconds_and_leaves_its_checkpoints(service, client, rows):
    job = client.create_job("cancel", config(rows, maxSteps=100_000, saveSteps=20))
    follower = Follower(client, job.id)
    follower.wait_for(lambda e: e.type == event.CHECKPOINT)
    client.cancel_job(job.id)
    events = follower.join(10)
    assert events[-1].type == event.CANCELLED
    assert [e.id for e in events] == list(range(1, len(events) + 1))
    training = lambda: [t for t in service.processes().values() if PARTS["driver"](t) or PARTS["worker"](t)]  # noqa: E731
    wait_for(lambda: not training(), 30, "the cancelled job still runs", lambda: "\n".join(training()))
    step = saved_steps(events)[0]
    assert ask(client, adapter={"kind": "checkpoint", "jobId": job.id, "step": step})["content"] is not None


def test_storage_that_answers_503_for_half_a_minute_delays_the_job_and_no_more(tmp_path, tiny, rows, s3_endpoint):
    with FaultyProxy(s3_endpoint.endpoint_url) as proxy:
        bucket = s3_endpoint.make_bucket()
        storage = {**s3_endpoint.at(proxy.url).environment, "ARKOR_RAY_STORAGE_URL": f"s3://{bucket}/arkor"}
        service = RunningService(tmp_path, models={"tiny": tiny}, environment=storage)
        try:
            service.start()
            with service.client() as client:
                job = client.create_job("outage", config(rows))
                follower = Follower(client, job.id)
                follower.wait_for(lambda e: e.type == event.LOG and e.data["step"] >= SAVE_EVERY - 2)
                began = time.monotonic()
                proxy.fail_for(30)
                events = follower.join()
                assert proxy.failed > 0
                assert time.monotonic() - began > 30
                assert_whole(events)
                assert_checkpoints_answer(client, job.id, events)
        finally:
            service.crash()
