"""The sink on rank 0, against a recorder that is told when to answer, when to die and when to refuse."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, ObjectStoreFullError, OutOfDiskError, RayTaskError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from arkor_ray.errors import GoneError, InternalError, ServiceUnavailableError, TrainingError
from arkor_ray.storage.retry import RetryPolicy
from arkor_ray.training import callbacks
from arkor_ray.training.callbacks import RayEventSink
from arkor_ray.training.failure_policy import FinalErrorsEndTheRun, final_error

WAIT_S = 10


class Method:
    def __init__(self, recorder: FakeRecorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    def remote(self, *args: Any) -> Any:
        if self._name == "stage" and self._recorder.store_full is not None:
            raise self._recorder.store_full  # arguments go into the object store before the call is made
        return lambda: self._recorder.answer(self._name, args)


class FakeRecorder:
    """Keeps what it is told, in the order in which it was durable; `hold` and `let_go` stand for slow serving."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.serving = threading.Event()
        self.serving.set()
        self.failures: dict[str, list[Exception]] = {}  # of the next calls of a method
        self.store_full: Exception | None = None
        self.dropping = False  # as a recorder does whose attempt is over

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)

    def hold(self) -> None:
        self.serving.clear()

    def let_go(self) -> None:
        self.serving.set()

    def fail(self, method: str, error: Exception, times: int = 1) -> None:
        self.failures[method] = [error] * times

    def answer(self, name: str, args: tuple[Any, ...]) -> Any:
        if name == "should_stop":
            return False
        if self.failures.get(name):
            raise self.failures[name].pop()
        if name == "checkpoint":
            assert self.serving.wait(WAIT_S)
            self.told.append((name, args[0]["step"]))
        elif name == "tell":
            self.told += [(method, rest[0].get("step")) for method, rest in args[0] if not self.dropping]
            return not self.dropping
        return None


@pytest.fixture
def recorder(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "get", lambda call, timeout=None: call())
    monkeypatch.setattr(callbacks, "UNTIL_CLOSED", RetryPolicy(math.inf, 0.001, 0.01))
    return FakeRecorder()


@pytest.fixture
def sink(recorder):
    sink = RayEventSink(recorder)
    yield sink
    sink.close()


def test_reports_arrive_in_order_and_flush_waits_for_them(sink, recorder):
    sink.started({"step": 0})
    for step in range(1, 500):
        sink.log({"step": step})
    sink.flush(WAIT_S)
    assert recorder.told == [("started", 0), *(("log", step) for step in range(1, 500))]


def test_a_checkpoint_comes_after_what_was_told_before_it(sink, recorder):
    for step in range(1, 51):
        sink.log({"step": step})
        if step % 10 == 0:
            sink.checkpoint({"step": step})
    sink.flush(WAIT_S)
    for step in range(10, 51, 10):
        assert recorder.told.index(("log", step)) < recorder.told.index(("checkpoint", step))
    assert [each for each in recorder.told if each[0] == "checkpoint"] == [("checkpoint", s) for s in range(10, 51, 10)]


def test_logs_do_not_wait_for_a_checkpoint_that_serving_is_slow_to_load(sink, recorder):
    recorder.hold()
    sink.checkpoint({"step": 10})
    sink.log({"step": 11})
    with pytest.raises(ServiceUnavailableError, match="1 checkpoints"):
        sink.flush(0.5)
    assert recorder.told == [("log", 11)]
    recorder.let_go()
    sink.flush(WAIT_S)
    assert recorder.told == [("log", 11), ("checkpoint", 10)]


def test_a_recorder_without_its_database_costs_an_attempt_and_not_the_job(sink, recorder):
    """What was not told at the end of training is told by the next attempt, which finds the final adapter in storage."""
    recorder.hold()
    sink.checkpoint({"step": 10})
    with pytest.raises(ServiceUnavailableError) as away:
        sink.flush(0.1)
    lost = WorkerGroupError("a worker failed", {0: UserExceptionWithTraceback(away.value, "traceback")})
    policy = FinalErrorsEndTheRun(DefaultFailurePolicy(FailureConfig(max_failures=1)))
    assert policy.make_decision(lost) is FailureDecision.RETRY
    assert final_error(lost) is None  # nor once the retries of this attempt are spent
    recorder.let_go()


def raised_remotely(error: Exception) -> Exception:
    """What arrives here when the recorder raises `error`."""
    return RayTaskError("tell", "traceback", error).as_instanceof_cause()


@pytest.mark.parametrize(
    "fault",
    [
        raised_remotely(ServiceUnavailableError("The database did not take it: deadlock detected")),
        raised_remotely(OSError("no space left")),
        ActorUnavailableError("restarting", None),
    ],
)
def test_a_fault_that_passes_loses_nothing_and_costs_nothing(sink, recorder, fault):
    recorder.fail("tell", fault, times=3)
    recorder.fail("checkpoint", fault, times=3)
    sink.log({"step": 1})
    sink.checkpoint({"step": 1})
    sink.log({"step": 2})
    sink.flush(WAIT_S)
    assert sorted(recorder.told) == [("checkpoint", 1), ("log", 1), ("log", 2)]
    assert sink.unrecorded() == []


def test_a_fault_that_does_not_pass_costs_the_attempt_and_is_named(sink, recorder):
    recorder.fail("tell", raised_remotely(ServiceUnavailableError("deadlock detected")), times=100_000)
    sink.log({"step": 1})
    with pytest.raises(ServiceUnavailableError, match=r"1 events .* It says: deadlock detected"):
        sink.flush(2.0)
    assert [entry["step"] for entry in sink.unrecorded()] == [1], "the next attempt tells it again"


@pytest.mark.parametrize(
    "refusal",
    [GoneError("no such job"), InternalError("integer out of range"), ValueError("no manifest"), KeyError("s")],
)
def test_what_the_recorder_refuses_is_raised_by_flush(sink, recorder, refusal):
    recorder.fail("tell", raised_remotely(refusal))
    sink.log({"step": 1})
    with pytest.raises(TrainingError, match=r"refused an event: [^\n]*$"):
        sink.flush(WAIT_S)


def test_what_was_refused_stays_unrecorded_whatever_is_taken_after_it(sink, recorder):
    recorder.fail("tell", raised_remotely(GoneError("no such job")))
    sink.log({"step": 1})
    with pytest.raises(TrainingError):
        sink.flush(WAIT_S)
    sink.log({"step": 2})
    with pytest.raises(TrainingError):
        sink.flush(WAIT_S)
    assert recorder.told == [("log", 2)]
    assert [entry["step"] for entry in sink.unrecorded()] == [1]


def test_a_closed_sink_does_not_go_on_trying(recorder):
    recorder.fail("tell", ActorUnavailableError("gone", None), times=100_000)
    sink = RayEventSink(recorder)
    sink.log({"step": 1})
    sink.close()
    left = [thread for thread in threading.enumerate() if thread.name == "event-sink"]
    for thread in left:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in left)


@pytest.mark.parametrize("full", [ObjectStoreFullError("full"), OutOfDiskError("full")])
def test_an_adapter_that_cannot_be_staged_is_read_from_storage(sink, recorder, full):
    recorder.store_full = full
    sink.stage("job-step-1", b"weights")
    sink.checkpoint({"step": 1})
    sink.flush(WAIT_S)
    assert recorder.told == [("checkpoint", 1)]


def test_no_call_carries_more_than_it_may(sink, recorder, monkeypatch):
    monkeypatch.setattr(callbacks, "MAX_BATCH", 3)
    for step in range(20):
        sink.log({"step": step})
    sink.flush(WAIT_S)
    assert [step for _, step in recorder.told] == list(range(20))


def test_log_entries_count_as_unrecorded_until_the_recorder_has_them(sink, recorder):
    sink.log({"step": 1})
    sink.flush(WAIT_S)
    assert sink.unrecorded() == []
    recorder.dropping = True
    sink.log({"step": 2})
    sink.flush(WAIT_S)
    assert [entry["step"] for entry in sink.unrecorded()] == [2]
