"""The gateway to Ray Serve: it waits for what starts, goes round what dies, and repeats nothing that has begun."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from arkor_ray.api import ray_gateway
from arkor_ray.api.ray_gateway import RayCluster, RayDriverLogs, RayInferenceGateway
from arkor_ray.errors import (
    AdapterError,
    ArkorError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    ServiceUnavailableError,
)
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.checkpoint import CheckpointManifest
from arkor_ray.serving import client as serving
from arkor_ray.settings import Settings

pytestmark = pytest.mark.anyio

START, DELTA, END = {"type": "start"}, {"type": "delta", "text": "a"}, {"type": "end"}
DIED = ActorDiedError()


def raised_remotely(error: Exception) -> Exception:
    """What arrives here when a replica raises `error`."""
    return RayTaskError("chat", "traceback with a secret", error).as_instanceof_cause()


class FakeStream:
    """What a handle's call gives: items, then possibly an error. None hangs."""

    def __init__(self, script: list[Any]) -> None:
        self._script = list(script)
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if not self._script:
            raise StopAsyncIteration
        item = self._script.pop(0)
        if item is None:
            await asyncio.Event().wait()
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


class FakeAdmit:
    """LLMServer.admit: raises what it was told to, one after the other, then takes what it is given. None hangs."""

    def __init__(self) -> None:
        self.errors: list[BaseException | None] = []
        self.admitted: list[str] = []
        self.cancelled = 0

    def remote(self, manifest: dict[str, Any], data: bytes | None) -> FakeAdmit:
        assert data is None, "replicas read adapters from storage"
        self._manifest = CheckpointManifest.model_validate(manifest)
        return self

    def __await__(self) -> Generator[Any, None, None]:
        return self._admit().__await__()

    def cancel(self) -> None:
        self.cancelled += 1

    async def _admit(self) -> None:
        if self.errors:
            error = self.errors.pop(0)
            if error is None:
                await asyncio.Event().wait()
            else:
                raise error
        self.admitted.append(self._manifest.adapter_id)


class FakeCluster(RayCluster):
    """A cluster told what to do: each call of chat takes the next script, the last one for ever."""

    def __init__(self, *scripts: list[Any]) -> None:
        self._scripts = list(scripts)
        self.streams: list[FakeStream] = []
        self.sessions: list[str] = []
        self.ensured: list[tuple[str, str]] = []
        self.unready: list[Exception] = []  # raised by ensure_serving, one after the other
        self.chat = self
        self.admit = FakeAdmit()

    async def ensure_serving(self, base_model: str, base_precision: str) -> None:
        self.ensured.append((base_model, base_precision))
        if self.unready:
            raise self.unready.pop(0)

    async def handle(self, base_model: str, base_precision: str) -> Any:
        return self

    async def default_precision(self) -> str:
        return "bf16"

    def options(self, *, session_id: str, stream: bool = False) -> Any:
        self.sessions.append(session_id)
        return self

    def remote(self, request: dict[str, Any], adapter_id: str | None) -> FakeStream:
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        self.streams.append(FakeStream(script))
        return self.streams[-1]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_gateway, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(ray_gateway, "LONGEST_DELAY_S", 0.002)


def gateway(cluster: FakeCluster, **settings: Any) -> RayInferenceGateway:
    return RayInferenceGateway(Settings(data_dir=Path("unused"), **settings), cluster)


async def ask(cluster: FakeCluster, precision: str | None = "fp32", adapter_id: str | None = "job-final") -> list[Any]:
    return [item async for item in gateway(cluster).chat("base", precision, {}, adapter_id)]


async def test_items_come_as_the_replica_gives_them() -> None:
    cluster = FakeCluster([START, DELTA, DELTA, END])
    assert await ask(cluster) == [START, DELTA, DELTA, END]
    assert cluster.ensured == [("base", "fp32")] and not cluster.streams[0].cancelled


async def test_application_is_asked_for_once() -> None:
    cluster = FakeCluster([START, END])
    inference = gateway(cluster)
    for _ in range(3):
        assert [item async for item in inference.chat("base", "fp32", {}, None)] == [START, END]
    assert len(cluster.ensured) == 1


@pytest.mark.parametrize("error", [raised_remotely(NotFoundError("No adapter")), DIED])
async def test_application_is_asked_for_again_only_after_nobody_answered(error: Exception) -> None:
    cluster = FakeCluster([START, error], [error], [START, END])
    inference = gateway(cluster)
    for _ in range(3):
        with contextlib.suppress(ArkorError):
            assert [item async for item in inference.chat("base", "fp32", {}, None)] == [START, END]
    assert len(cluster.ensured) == (2 if error is DIED else 1)


async def test_requests_for_an_adapter_stay_together_and_those_for_the_base_do_not() -> None:
    cluster = FakeCluster([START, END])
    for adapter_id in ("job-step-1", "job-step-1", None, None):
        await ask(cluster, adapter_id=adapter_id)
    assert cluster.sessions[:2] == ["job-step-1"] * 2
    assert len(set(cluster.sessions)) == 3 and all(cluster.sessions)


async def test_precision_is_that_of_the_request_then_of_the_settings_then_of_the_cluster() -> None:
    for precision, settings, expected in (
        ("nf4", {"default_precision": "fp32"}, "nf4"),
        (None, {"default_precision": "fp16"}, "fp16"),
        (None, {}, "bf16"),
    ):
        cluster = FakeCluster([START, END])
        assert [item async for item in gateway(cluster, **settings).chat("base", precision, {}, None)]
        assert cluster.ensured == [("base", expected)]


@pytest.mark.parametrize(
    "lost", [DIED, ActorUnavailableError("away", None), DeploymentUnavailableError("x"), asyncio.CancelledError()]
)
async def test_replica_lost_before_the_first_item_is_gone_round(lost: BaseException) -> None:
    cluster = FakeCluster([lost], [lost], [START, END])
    assert await ask(cluster) == [START, END]
    assert [stream.cancelled for stream in cluster.streams] == [True, True, False]
    assert len(cluster.ensured) == 3, "after a loss the application is asked for again"


async def test_application_that_is_starting_is_waited_for() -> None:
    cluster = FakeCluster([START, END])
    cluster.unready = [ServiceUnavailableError("The controller is starting")] * 3
    assert await ask(cluster) == [START, END]


async def test_cluster_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_gateway, "GIVE_UP_S", 0.05)
    assert ray_gateway.LONGEST_DELAY_S < 0.05
    with pytest.raises(ServiceUnavailableError, match="replica could not be reached") as raised:
        await ask(FakeCluster([DIED]))
    assert raised.value.retry_after
    cluster = FakeCluster([START])
    cluster.unready = [ServiceUnavailableError("No room for the model")] * 10_000
    with pytest.raises(ServiceUnavailableError, match="No room for the model"):
        await ask(cluster)


@pytest.mark.parametrize("error", [NotFoundError("No adapter"), InvalidRequestError("Too long", param="messages")])
async def test_error_of_the_replica_is_raised_as_itself_and_not_tried_again(error: ArkorError) -> None:
    cluster = FakeCluster([raised_remotely(error)])
    with pytest.raises(type(error)) as raised:
        await ask(cluster)
    assert type(raised.value) is type(error) and raised.value.to_wire() == error.to_wire()
    assert len(cluster.streams) == 1


@pytest.mark.parametrize("script", [[raised_remotely(ValueError("secret"))], [START, raised_remotely(ValueError("x"))]])
async def test_bug_of_the_replica_is_an_internal_error_without_its_words(script: list[Any]) -> None:
    cluster = FakeCluster(script)
    with pytest.raises(InternalError) as raised:
        await ask(cluster)
    assert "secret" not in raised.value.message and len(cluster.streams) == 1


@pytest.mark.parametrize("lost", [DIED, asyncio.CancelledError()])
async def test_replica_lost_in_the_middle_is_told_and_not_repeated(lost: BaseException) -> None:
    cluster = FakeCluster([START, DELTA, lost])
    seen = []
    with pytest.raises(ServiceUnavailableError, match="lost while it answered"):
        async for item in gateway(cluster).chat("base", "fp32", {}, None):
            seen.append(item)
    assert seen == [START, DELTA] and len(cluster.streams) == 1


async def test_closing_the_answer_cancels_the_request() -> None:
    cluster = FakeCluster([START, None])
    answer = gateway(cluster).chat("base", "fp32", {}, None)
    await anext(answer)
    await answer.aclose()
    assert cluster.streams[0].cancelled


@pytest.mark.parametrize("script", [[None], [START, None]])
async def test_our_own_cancellation_cancels_the_request_and_is_not_taken_for_a_loss(script: list[Any]) -> None:
    cluster = FakeCluster(script)
    task = asyncio.create_task(ask(cluster))
    while not cluster.streams:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cluster.streams[0].cancelled and len(cluster.streams) == 1


MANIFEST = CheckpointManifest(
    adapter_id="job-final", job_id="job", step=4, final=True, base_model="base", base_precision="fp32", r=8,
    lora_alpha=8, target_modules=["q_proj"], files=[], created_at=utcnow(),
)  # fmt: skip


async def test_adapter_is_prepared_where_its_requests_will_go() -> None:
    cluster = FakeCluster([START, END])
    await gateway(cluster).prepare("base", "fp32", MANIFEST)
    assert cluster.admit.admitted == cluster.sessions == ["job-final"]
    assert cluster.ensured == [("base", "fp32")]


async def test_base_model_is_prepared_by_starting_its_application() -> None:
    cluster = FakeCluster([START, END])
    inference = gateway(cluster)
    for _ in range(2):  # it may have been removed since
        await inference.prepare("base", None, None)
    assert cluster.ensured == [("base", "bf16")] * 2 and cluster.admit.admitted == []


async def test_preparing_waits_for_what_starts_and_goes_round_what_dies() -> None:
    cluster = FakeCluster([START, END])
    cluster.unready = [ServiceUnavailableError("The controller is starting")] * 2
    cluster.admit.errors = [DIED, asyncio.CancelledError()]
    await gateway(cluster).prepare("base", "fp32", MANIFEST)
    assert cluster.admit.admitted == ["job-final"]


async def test_refused_adapter_is_told_as_it_is_and_not_tried_again() -> None:
    cluster = FakeCluster([START, END])
    cluster.admit.errors = [raised_remotely(AdapterError("made for another base"))] * 2
    with pytest.raises(AdapterError, match="made for another base"):
        await gateway(cluster).prepare("base", "fp32", MANIFEST)
    assert len(cluster.admit.errors) == 1


async def test_preparing_that_hangs_is_given_up_and_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_gateway, "PREPARE_S", 0.05)
    cluster = FakeCluster([START, END])
    cluster.admit.errors = [None]
    with pytest.raises(ServiceUnavailableError, match="ready within"):
        await gateway(cluster).prepare("base", "fp32", MANIFEST)
    assert cluster.admit.cancelled == 1


async def test_request_that_waits_for_a_removed_application_has_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_gateway, "SLOW_S", 0.01)
    cluster = FakeCluster([None])
    task = asyncio.create_task(ask(cluster))
    while len(cluster.ensured) < 2:
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait({task})


@pytest.mark.parametrize("away", ["refusing", "hanging"])
async def test_a_slow_answer_needs_no_controller(monkeypatch: pytest.MonkeyPatch, away: str) -> None:
    monkeypatch.setattr(ray_gateway, "SLOW_S", 0.01)
    answers = asyncio.Event()

    class SlowStream(FakeStream):
        async def __anext__(self) -> Any:
            await answers.wait()
            return await super().__anext__()

    class Cluster(FakeCluster):
        def remote(self, request: dict[str, Any], adapter_id: str | None) -> FakeStream:
            self.streams.append(SlowStream([START, END]))
            return self.streams[-1]

        async def ensure_serving(self, base_model: str, base_precision: str) -> None:
            await super().ensure_serving(base_model, base_precision)
            if away == "hanging" and len(self.ensured) > 1:
                await asyncio.Event().wait()

    cluster = Cluster([START])
    inference = gateway(cluster)
    await inference.prepare("base", "fp32", None)  # while the controller was there
    if away == "refusing":
        cluster.unready = [ServiceUnavailableError("The controller is starting")] * 10_000
    inference._handles["base", "fp32"] = cluster

    async def items() -> list[Any]:
        return [item async for item in inference.chat("base", "fp32", {}, None)]

    asking = asyncio.create_task(items())
    while len(cluster.ensured) < (4 if away == "refusing" else 2):
        await asyncio.sleep(0.001)
    assert not asking.done()
    answers.set()
    assert await asyncio.wait_for(asking, 30) == [START, END]
    assert len(cluster.streams) == 1


async def test_an_application_that_cannot_be_started_is_told_where_no_replica_answers(monkeypatch) -> None:
    monkeypatch.setattr(ray_gateway, "SLOW_S", 0.01)
    monkeypatch.setattr(ray_gateway, "GIVE_UP_S", 0.05)
    cluster = FakeCluster([None])
    inference = gateway(cluster)
    inference._handles["base", "fp32"] = cluster
    cluster.unready = [ServiceUnavailableError("No room for the model")] * 10_000
    with pytest.raises(ServiceUnavailableError, match="No room for the model"):
        await anext(inference.chat("base", "fp32", {}, None))
    assert cluster.streams[0].cancelled


class FakeRayJobs:
    """A Ray Jobs client and the looking for it, which takes until the head is `there`."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.looked = 0
        self.failing: BaseException | None = None

    def find(self) -> FakeRayJobs:
        self.looked += 1
        self.there.wait(60)
        return self

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        if self.failing is not None:
            raise self.failing
        yield f"log of {submission_id}"


@pytest.fixture
def ray_jobs(monkeypatch: pytest.MonkeyPatch) -> FakeRayJobs:
    jobs = FakeRayJobs()
    monkeypatch.setattr(ray_gateway, "ray_jobs_client", jobs.find)
    return jobs


async def read_all(logs: RayDriverLogs) -> list[str]:
    return [piece async for piece in logs.follow("job-1")]


async def test_followers_of_logs_take_nobodys_thread_while_rays_head_is_away(ray_jobs: FakeRayJobs) -> None:
    logs, few = RayDriverLogs(), ThreadPoolExecutor(2)
    asyncio.get_running_loop().set_default_executor(few)  # Serve gives a replica's loop five
    followers = [asyncio.create_task(read_all(logs)) for _ in range(8)]
    try:
        while not ray_jobs.looked:
            await asyncio.sleep(0.001)
        await asyncio.wait_for(asyncio.to_thread(time.monotonic), 30)
        await asyncio.wait_for(serving.look_up(time.monotonic), 30)
    finally:
        ray_jobs.there.set()
    assert await asyncio.gather(*followers) == [["log of job-1"]] * 8
    assert await read_all(logs) == ["log of job-1"]
    assert ray_jobs.looked == 1, "once for all, and kept"


async def test_ray_jobs_are_looked_up_anew_when_nobody_is_there_any_more(ray_jobs: FakeRayJobs) -> None:
    ray_jobs.there.set()
    logs = RayDriverLogs()
    for error, looked in ((RuntimeError("no such submission"), 1), (ConnectionRefusedError("moved"), 2)):
        ray_jobs.failing = error
        for _ in range(ray_gateway.FAILURES):
            with pytest.raises(ServiceUnavailableError):
                await read_all(logs)
        ray_jobs.failing = None
        assert (await read_all(logs), ray_jobs.looked) == (["log of job-1"], looked)


class HangingController:
    """Answers `default_precision` until it hangs, or is not there."""

    def __init__(self) -> None:
        self.precision, self.asked = "fp32", 0
        self.hanging, self.gone = False, False

    async def ask(self, method: str) -> str:
        assert method == "default_precision"
        self.asked += 1
        if self.gone:
            raise ServiceUnavailableError("The controller is starting; try again")
        if self.hanging:
            await asyncio.Event().wait()
        return self.precision


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> HangingController:
    controller = HangingController()
    monkeypatch.setattr(ray_gateway.serving, "ask_controller", controller.ask)
    monkeypatch.setattr(ray_gateway, "ANSWER_S", 0.05)
    return controller


async def test_the_default_precision_is_asked_for_once_and_again_after_a_while(controller, monkeypatch) -> None:
    cluster = RayCluster()
    assert [await cluster.default_precision() for _ in range(3)] == ["fp32"] * 3
    assert controller.asked == 1
    monkeypatch.setattr(ray_gateway, "ASK_AGAIN_S", 0.0)
    controller.precision = "bf16"
    assert await cluster.default_precision() == "bf16"


@pytest.mark.parametrize("away", ["hanging", "gone"])
async def test_a_controller_that_is_away_keeps_no_request_waiting_that_knows_the_precision(
    controller, monkeypatch, away
) -> None:
    cluster = RayCluster()
    await cluster.default_precision()
    monkeypatch.setattr(ray_gateway, "ASK_AGAIN_S", 0.0)
    setattr(controller, away, True)
    async with asyncio.timeout(5):
        assert await cluster.default_precision() == "fp32"
    assert controller.asked == 2


async def test_a_first_request_needs_the_controller(controller) -> None:
    controller.gone = True
    with pytest.raises(ServiceUnavailableError, match="starting"):
        await RayCluster().default_precision()
