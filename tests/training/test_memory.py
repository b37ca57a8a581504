"""Memory that runs out: what the user is told, and how few rows a job goes on with."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.exceptions import OutOfMemoryError as KilledForMemory
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from arkor_ray.errors import InternalError, from_wire
from arkor_ray.schemas.job import JobConfig
from arkor_ray.training import trainer
from arkor_ray.training.failure_policy import FinalErrorsEndTheRun, final_error
from arkor_ray.training.job_spec import JobSpec
from arkor_ray.training.memory import MemoryExhaustedError, naming_what_to_lower

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def job(**config) -> JobConfig:
    return JobConfig.parse({"model": "base", "datasetSource": {"type": "huggingface", "name": "a/b"}, **config})


def told(error: Exception, config: JobConfig | None = None, rows: int | None = None) -> MemoryExhaustedError:
    with pytest.raises(MemoryExhaustedError) as raised, naming_what_to_lower(config or job(), rows):
        raise error
    return raised.value


def test_what_did_not_fit_is_named_with_its_values_and_what_to_lower():
    message = told(FULL, job(batchSize=8, maxLength=4096, zeroStage=1), rows=4).message
    for part in (
        "pass of 4 rows",
        "config.batchSize 8",
        "config.maxLength 4096",
        "config.zeroStage 1",
        "Tried to allocate 20.00 GiB",
        "lower config.batchSize",
        "lower config.maxLength",
        "set config.zeroStage 3",
        "set config.loadIn4bit true",
    ):
        assert part in message


def test_remedies_that_would_not_help_are_not_named():
    one_row = told(FULL, job(loadIn4bit=True, zeroStage=2), rows=1).message
    assert "pass of 1 row does" in one_row and "maxLength unset" in one_row
    remedies = one_row.partition("Remedies: ")[2]
    assert remedies == "lower config.maxLength; take a smaller config.model."
    whole_model = told(FULL).message.partition("Remedies: ")[2]
    assert "batchSize" not in whole_model and "maxLength" not in whole_model


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    ],
)
def test_memory_runs_out_under_several_names(error):
    assert told(error, rows=2).rows == 2


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), naming_what_to_lower(job(), 2):
        raise RuntimeError("shapes do not match")


def raised_by_worker(error: Exception) -> WorkerGroupError:
    failures = {0: error, 1: UserExceptionWithTraceback(RuntimeError("connection closed by peer"), "traceback")}
    return WorkerGroupError("workers failed", failures)


def decide(error: WorkerGroupError) -> FailureDecision:
    return FinalErrorsEndTheRun(DefaultFailurePolicy(FailureConfig(max_failures=3))).make_decision(error)


def test_a_worker_without_memory_ends_the_run_and_one_that_was_killed_does_not():
    sent = pickle.loads(pickle.dumps(told(FULL, rows=4)))  # by way of Ray Train's controller to the driver
    ended = raised_by_worker(UserExceptionWithTraceback(sent, "traceback"))
    assert decide(ended) is FailureDecision.RAISE
    final = final_error(ended)
    assert isinstance(final, MemoryExhaustedError) and final.rows == 4
    for killed in (ActorDiedError(), KilledForMemory("a node ran low on memory")):
        assert decide(raised_by_worker(killed)) is FailureDecision.RETRY
        assert final_error(raised_by_worker(killed)) is None


class FakeWorkers:
    """Have room for `room` rows in a forward pass, None: not even for the model. `groups`: those started, by their rows."""

    def __init__(self, room: int | None) -> None:
        self.room = room
        self.groups: list[int] = []

    def fit(self, loop) -> str:
        rows = loop.spec.rows_per_pass or loop.spec.config.batch_size
        self.groups.append(rows)
        with naming_what_to_lower(loop.spec.config, None if self.room is None else rows):
            if self.room is None or rows > self.room:
                raise FULL
        return "done"


@pytest.fixture
def fit(monkeypatch):
    def fit(workers: FakeWorkers, **config):
        monkeypatch.setattr(trainer, "_fit", workers.fit)
        monkeypatch.setattr(trainer.ray, "put", lambda value: value)
        spec = JobSpec("job", job(**config), "base", "file:///store")
        return trainer.fit(spec, SimpleNamespace(train=[], evaluation=None), recorder=None)

    return fit


def test_rows_are_halved_until_they_fit(fit):
    workers = FakeWorkers(room=2)
    assert fit(workers, batchSize=9) == "done"
    assert workers.groups == [9, 4, 2]


def test_one_row_that_does_not_fit_fails_the_job(fit):
    workers = FakeWorkers(room=0)
    with pytest.raises(MemoryExhaustedError, match=r"config\.batchSize 4"):
        fit(workers, batchSize=4)
    assert workers.groups == [4, 2, 1]


def test_a_model_that_does_not_fit_is_not_tried_with_fewer_rows(fit):
    workers = FakeWorkers(room=None)
    with pytest.raises(MemoryExhaustedError, match="The model does not fit"):
        fit(workers, batchSize=4)
    assert workers.groups == [4]


def test_a_fault_of_a_server_is_not_taken_for_memory_that_ran_out():
    assert type(from_wire(500, {"error": "no"})) is InternalError
