"""Reaching serving while parts of Ray are away, against a Ray that is told what to say."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from arkor_ray.errors import AdapterError, ServiceUnavailableError
from arkor_ray.serving import client
from tests.serving.fake_replica import FakeReplica

MANIFEST = {"base_model": "base", "base_precision": "fp32", "adapter_id": "job-step-1"}


class FakeController:
    """The service's controller: `answer` comes from whatever is asked, or is raised."""

    def __init__(self, answer=None):
        self.answer = answer
        self.default_precision = SimpleNamespace(remote=lambda: self._reply(self.answer))
        self.ensure_serving = SimpleNamespace(remote=lambda *_: self._reply(self._serving()))
        self.starting: list[str] = []

    def starts(self, *said: str) -> None:
        """Says so of an application, one after the other, until it runs."""
        self.starting = list(said)

    def _serving(self):
        if self.answer is not None and not isinstance(self.answer, str):
            return self.answer
        return self.starting.pop(0) if self.starting else None

    async def _reply(self, answer):
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, asyncio.Event):
            await answer.wait()
        return answer


class FakeRay:
    """Its head knows the controller, or nobody (`lose`); counts how often it is asked."""

    def __init__(self):
        self.controller: FakeController | None = FakeController("fp32")
        self.asked = 0

    def get_actor(self, *_):
        self.asked += 1
        if self.controller is None:
            raise ValueError("no such actor")
        return self.controller


@pytest.fixture
def fake_ray(monkeypatch):
    monkeypatch.setattr(client, "_controller", [])
    monkeypatch.setattr(client, "_handles", {})
    monkeypatch.setattr(client, "ENSURED_S", 0.1)
    fake = FakeRay()
    monkeypatch.setattr(ray, "get_actor", fake.get_actor)
    return fake


@pytest.fixture(autouse=True)
def replica(monkeypatch):
    """What Serve gives for a handle, or raises if it is told an `absence`."""
    fake = FakeReplica()
    fake.absence = None

    def get_deployment_handle(*_):
        if fake.absence is not None:
            raise fake.absence
        return fake

    monkeypatch.setattr("ray.serve.get_deployment_handle", get_deployment_handle)
    return fake


def ask():
    return asyncio.run(client.ask_controller("default_precision"))


def test_the_controller_is_looked_up_once_so_that_it_answers_while_the_head_is_away(fake_ray):
    assert ask() == "fp32"
    assert ask() == "fp32"
    assert fake_ray.asked == 1


def test_a_controller_that_is_restarting_is_not_looked_up_again_but_one_that_was_stopped_is(fake_ray):
    ask()
    fake_ray.controller.answer = ray.exceptions.ActorUnavailableError("restarting", None)
    with pytest.raises(ServiceUnavailableError):
        ask()
    fake_ray.controller.answer = ray.exceptions.ActorDiedError()
    with pytest.raises(ServiceUnavailableError):
        ask()
    fake_ray.controller = FakeController("bf16")
    assert ask() == "bf16"
    assert fake_ray.asked == 2


def test_a_service_without_a_controller_is_starting(fake_ray):
    fake_ray.controller = None
    with pytest.raises(ServiceUnavailableError, match="starting"):
        ask()


def test_an_adapter_is_admitted_where_serving_ran_before_though_nobody_can_say_that_it_does(fake_ray):
    async def run():
        first = await client.admit(MANIFEST, None)
        fake_ray.controller.answer = asyncio.Event()  # never set: it waits for a head that is away
        return first, await client.admit(MANIFEST, None)

    first, second = asyncio.run(run())
    assert first == second == {"adapter_id": "job-step-1"}


def test_an_application_that_never_ran_is_waited_for(fake_ray):
    fake_ray.controller.answer = asyncio.Event()

    async def run():
        await asyncio.wait_for(client.admit(MANIFEST, None), 0.5)

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def test_a_chat_waits_for_an_application_that_starts(fake_ray):
    fake_ray.controller.starts("DEPLOYING", "DEPLOYING")
    asyncio.run(client.ensure_serving("base", "fp32"))
    assert fake_ray.controller.starting == []


def test_what_an_application_waits_for_is_told_in_the_end(fake_ray):
    fake_ray.controller.starts("no node has a GPU")
    with pytest.raises(ServiceUnavailableError, match="no node has a GPU"):
        asyncio.run(client.ensure_serving("base", "fp32", patience_s=0))


def test_an_adapter_that_waits_for_its_application_is_told_so_at_once(fake_ray):
    fake_ray.controller.starts("no node has a GPU")
    with pytest.raises(ServiceUnavailableError, match="no node has a GPU"):
        asyncio.run(client.admit(MANIFEST, None))


@pytest.mark.parametrize(
    "lost",
    [
        asyncio.CancelledError(),  # what Serve makes of a replica that shuts down
        DeploymentUnavailableError("LLMServer"),
        RayServeException("no route"),
        ActorUnavailableError("away", None),
    ],
)
def test_a_replica_that_is_lost_while_it_loads_an_adapter_may_be_asked_again(fake_ray, replica, lost):
    replica.error = lost
    with pytest.raises(ServiceUnavailableError) as raised:
        asyncio.run(client.admit(MANIFEST, None))
    assert raised.value.message and raised.value.retry_after


@pytest.mark.parametrize(
    "absence",
    [
        KeyError("LLMServer does not exist"),
        RayServeException("There is no Serve instance running"),
        ActorUnavailableError("Serve's controller is restarting", None),
        GetTimeoutError("Serve's controller does not answer"),
    ],
)
def test_an_application_that_serve_has_no_handle_of_now_may_be_asked_for_again(fake_ray, replica, absence):
    replica.absence = absence
    with pytest.raises(ServiceUnavailableError):
        asyncio.run(client.admit(MANIFEST, None))


def test_what_a_replica_says_of_an_adapter_is_raised_as_it_is(fake_ray, replica):
    replica.error = RayTaskError("admit", "traceback", AdapterError("rank too large")).as_instanceof_cause()
    with pytest.raises(AdapterError, match="rank too large"):
        asyncio.run(client.admit(MANIFEST, None))


def test_a_caller_that_is_out_of_patience_is_not_told_of_a_lost_replica(fake_ray, replica):
    replica.hangs = True

    async def run():
        async with asyncio.timeout(0.2):
            await client.admit(MANIFEST, None)

    with pytest.raises(TimeoutError):
        asyncio.run(run())
