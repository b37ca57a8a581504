"""Counts on their way from the processes of a job to the controller."""

from __future__ import annotations

import pickle
import threading

import pytest

from arkor_ray.telemetry import export, metrics
from arkor_ray.telemetry.export import Batch, ControllerExporter, FewModels
from tests.telemetry.recorded import Recorded

ANY = FewModels([])


class FakeController:
    """Takes batches as they arrive over Ray: pickled. Told to `leave` and to `return_`."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self._away = False

    def send(self, batch: Batch, surely: bool) -> None:
        if self._away:
            raise ValueError("no such actor")
        self.batches.append(pickle.loads(pickle.dumps(batch)))

    def leave(self) -> None:
        self._away = True

    def return_(self) -> None:
        self._away = False


@pytest.fixture
def controller() -> FakeController:
    return FakeController()


@pytest.fixture
def gauges() -> Recorded:
    return Recorded()


@pytest.fixture
def exporter(controller, gauges):
    made = ControllerExporter(controller.send, gauges)
    metrics.export_to(made)
    yield made
    metrics.export_to(None)


def test_counts_are_added_up_and_arrive_as_they_were(exporter, controller, recorded_apart):
    for _ in range(3):
        metrics.TRAINING_STEPS.add(base_model="a")
    metrics.TRAINING_STEPS.add(2, base_model="b")
    for seconds in (0.1, 0.2):
        metrics.TRAINING_STEP_SECONDS.observe(seconds, base_model="a")
    exporter.send()
    exporter.send()
    assert len(controller.batches) == 1, "nothing new is nothing to send"
    metrics.export_to(recorded_apart)
    controller.batches[0].replay(ANY)
    assert recorded_apart.total(metrics.TRAINING_STEPS, base_model="a") == 3
    assert recorded_apart.total(metrics.TRAINING_STEPS, base_model="b") == 2
    assert recorded_apart.all(metrics.TRAINING_STEP_SECONDS, base_model="a") == [0.1, 0.2]


def test_models_that_users_choose_make_no_series_without_end(exporter, controller, recorded_apart, monkeypatch):
    monkeypatch.setattr(export, "MAX_OTHER_MODELS", 2)
    models = FewModels(["listed"])
    metrics.export_to(recorded_apart)
    for model in ("hub/a", "hub/b", "hub/c", "hub/d", "hub/a", "listed"):
        batch = Batch()
        batch.count(("arkor_training_steps_total", (("base_model", model),)), 1)
        batch.observe(("arkor_training_checkpoint_seconds", (("base_model", model), ("stage", "upload"))), 0.5)
        batch.replay(models)
    for model, times in {"hub/a": 2, "hub/b": 1, "hub/c": 0, "other": 2, "listed": 1}.items():
        assert recorded_apart.total(metrics.TRAINING_STEPS, base_model=model) == times
        told = recorded_apart.all(metrics.TRAINING_CHECKPOINT_SECONDS, base_model=model, stage="upload")
        assert told == [0.5] * times


def test_what_does_not_arrive_comes_with_the_next(exporter, controller):
    controller.leave()
    metrics.TRAINING_STEPS.add(5, base_model="a")
    metrics.TRAINING_STEP_SECONDS.observe(0.1, base_model="a")
    exporter.send(surely=True)
    controller.return_()
    metrics.TRAINING_STEPS.add(base_model="a")
    exporter.send()
    [batch] = controller.batches
    assert list(batch.counts.values()) == [6]
    assert list(batch.observations.values()) == [[0.1]]


def test_a_controller_that_stays_away_costs_little_memory(exporter, controller, monkeypatch):
    monkeypatch.setattr(export, "MAX_OBSERVATIONS", 3)
    controller.leave()
    for _ in range(5):
        metrics.TRAINING_STEP_SECONDS.observe(0.1, base_model="a")
        exporter.send()
    controller.return_()
    exporter.send()
    assert [len(values) for values in controller.batches[0].observations.values()] == [3]


def test_gauges_end_with_the_process_so_they_are_its_own(exporter, controller, gauges):
    metrics.TRAINING_LOSS.set(1.5, base_model="a", job_id="j")
    exporter.send()
    assert controller.batches == []
    assert gauges.now(metrics.TRAINING_LOSS, base_model="a", job_id="j") == 1.5


def test_a_process_without_ray_does_not_start_one():
    with pytest.raises(RuntimeError, match="not connected"):
        export.send_to_controller(Batch(), False)


def test_a_collector_that_fails_does_not_end_the_others(monkeypatch, caplog):
    monkeypatch.setattr(export, "TICK_S", 0.01)
    monkeypatch.setattr(export, "_collectors", [])
    monkeypatch.setattr(export, "_ticking", None)
    called = threading.Semaphore(0)

    def fail() -> None:
        raise RuntimeError("the engine is gone")

    export.each_second(fail)
    export.each_second(called.release)
    for _ in range(3):
        assert called.acquire(timeout=30)
    export._collectors.clear()
    assert caplog.text.count("cannot be collected") == 1


def test_gauges_are_told_again_until_they_are_forgotten(monkeypatch):
    told: list[tuple[str, float]] = []

    class FakeRayGauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self._name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            told.append((self._name, value))

    from ray.util import metrics as ray_metrics

    monkeypatch.setattr(ray_metrics, "Gauge", FakeRayGauge)
    exporter = export.RayExporter()
    exporter.set(metrics.JOBS, 3, {"status": "queued"})
    exporter.set(metrics.CONTROLLER_LEADER, 1, {})
    exporter.forget(metrics.JOBS)
    exporter.again()
    assert told == [("arkor_jobs", 3), ("arkor_controller_leader", 1), ("arkor_controller_leader", 1)]
