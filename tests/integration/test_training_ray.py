"""The driver's half on a real Ray: two workers, one of them killed, errors that are final, and cancelling."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from arkor_ray.training.job_spec import JobSpec
from tests.training.process_group import LoopRun, run_in_group
from tests.training.tiny import make_base_model, make_spec

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster():
    environment = {"HF_HUB_OFFLINE": "1"}
    ray.init(address="local", num_cpus=4, include_dashboard=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base_model(tmp_path_factory.mktemp("base"))


@ray.remote(num_cpus=0, max_concurrency=100)
class ListRecorder:
    """Keeps what it is told; `stop_at` is the step after whose log the job counts as cancelled."""

    def __init__(self, stop_at: int | None = None) -> None:
        self._calls: list[tuple] = []
        self._stop_at = stop_at

    async def tell(self, reports) -> bool:
        for method, args in reports:
            await getattr(self, method)(*args)
        return True

    async def started(self, metadata) -> None:
        self._calls.append(("started", metadata))

    async def log(self, entry) -> None:
        self._calls.append(("log", entry))

    async def notice(self, type, data) -> None:
        self._calls.append(("notice", type, data))

    async def stage(self, adapter_id, data) -> None:
        self._calls.append(("stage", adapter_id))

    async def checkpoint(self, manifest) -> None:
        self._calls.append(("checkpoint", manifest["adapter_id"]))

    async def completed(self, manifest, metrics) -> None:
        self._calls.append(("completed", manifest["adapter_id"], metrics))

    async def failed(self, error, step, preflight=None) -> None:
        self._calls.append(("failed", error, step, preflight))

    async def should_stop(self) -> bool:
        return self._stop_at is not None and any(c[0] == "log" and c[1]["step"] >= self._stop_at for c in self._calls)

    async def calls(self) -> list[tuple]:
        return self._calls


def run(spec: JobSpec, recorder) -> list[tuple]:
    from arkor_ray.training.trainer import run_job

    run_job(spec, recorder)
    return ray.get(recorder.calls.remote())


def wait_for_step(recorder, step: int) -> None:
    while not any(c[0] == "log" and c[1]["step"] >= step for c in ray.get(recorder.calls.remote())):
        time.sleep(0.05)


def train_workers() -> list[psutil.Process]:
    """The training processes of this test's own Ray."""
    mine = psutil.Process().children(recursive=True)
    return [p for p in mine if p.is_running() and "RayTrainWorker" in " ".join(p.cmdline())]


def test_a_killed_worker_leaves_no_trace_in_the_loss_curve(cluster, base, tmp_path) -> None:
    config = {"numWorkers": 2, "zeroStage": 2, "maxSteps": 60, "saveSteps": 4, "learningRate": 3e-3}
    spec = make_spec(tmp_path / "killed", base, **config)
    recorder = ListRecorder.remote()

    def kill() -> None:
        wait_for_step(recorder, 9)
        train_workers()[-1].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    calls = run(spec, recorder)
    assert not killer.is_alive(), "the worker died before the end"
    assert calls[-1][:2] == ("completed", "job-1-final")

    begun = [i for i, c in enumerate(calls) if c[0] == "started"]
    assert len(begun) == 2, "the workers began again once"
    first, second = ([c[1] for c in part if c[0] == "log"] for part in (calls[: begun[1]], calls[begun[1] :]))
    before = [entry["step"] for entry in first]
    assert before == list(range(1, before[-1] + 1))
    # An entry that was new when the checkpoint was taken is told again, as it was; it was not trained again.
    after = [entry["step"] for entry in second if entry not in first]
    assert after[0] % 4 == 1 and 4 < after[0] <= before[-1] + 1, "it went on from a checkpoint"
    assert after == list(range(after[0], 61))
    (whole,) = run_in_group([LoopRun(make_spec(tmp_path / "whole", base, **config))], 2, tmp_path / "group")
    told = [(c[1]["step"], c[1]["loss"]) for c in calls if c[0] == "log"]
    for step, loss in told:  # steps told twice were the same both times
        assert loss == pytest.approx(whole.losses[step], abs=1e-4)
    announced = {c[1] for c in calls if c[0] == "checkpoint"}
    assert announced == {*(f"job-1-step-{n}" for n in range(4, 61, 4)), "job-1-final"}


@dataclass(frozen=True)
class SmallCard:
    """Makes the sink, and leaves the first worker memory for `ROWS` rows in a forward pass."""

    recorder: Any

    ROWS = 2

    def __call__(self):
        import torch

        from arkor_ray.training.callbacks import RayEventSink
        from arkor_ray.training.loss import SelectiveLoss

        forward = SelectiveLoss.__call__

        def narrow(loss, engine, batch, device):
            if len(batch.input_ids) > self.ROWS:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return forward(loss, engine, batch, device)

        SelectiveLoss.__call__ = narrow
        return RayEventSink(self.recorder)


def test_rows_that_do_not_fit_into_a_workers_memory_are_halved(cluster, base, tmp_path, monkeypatch) -> None:
    from arkor_ray.training import trainer

    monkeypatch.setattr(trainer, "_SinkOf", SmallCard)
    calls = run(make_spec(tmp_path, base, numWorkers=2, batchSize=4, maxSteps=2, zeroStage=2), ListRecorder.remote())
    begun = [c[1] for c in calls if c[0] == "started"]
    assert [(each["batch_size"], each["global_batch_size"]) for each in begun] == [(4, 8), (2, 8)]
    assert calls[-1][:2] == ("completed", "job-1-final")


def test_a_base_model_without_weights_fails_at_once(cluster, base, tmp_path) -> None:
    broken = make_base_model(tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    calls = run(make_spec(tmp_path / "job", broken), ListRecorder.remote())
    assert [c[0] for c in calls] == ["notice", "failed"]
    assert "weights of base model" in calls[-1][1]


def test_unusable_data_fails_before_any_worker_starts(cluster, base, tmp_path) -> None:
    calls = run(make_spec(tmp_path, base, datasetFormat="alpaca"), ListRecorder.remote())
    assert [c[0] for c in calls] == ["failed"]
    _, error, _, preflight = calls[0]
    assert "None of the data set's 21 rows can be used: row 1 'instruction' is missing" in error
    assert preflight["rejected_rows"] == 21


def test_a_cancelled_job_stops_between_steps_with_a_checkpoint(cluster, base, tmp_path) -> None:
    spec = make_spec(tmp_path, base, maxSteps=100_000, saveSteps=50_000)
    calls = run(spec, ListRecorder.remote(stop_at=3))
    last = max(c[1]["step"] for c in calls if c[0] == "log")
    assert 3 <= last < 100_000
    assert [c[1] for c in calls if c[0] == "checkpoint"] == [f"job-1-step-{last}"]
    assert not [c for c in calls if c[0] in ("completed", "failed")]
