"""How measurements leave a process.

Ray exports what its processes record: one target for Prometheus per node, `ray.nodes()[i]["MetricsExportPort"]`. Its agents
keep the counters of every process for as long as the node lives, one series each. That is right for replicas and the
controller. The processes of a job come and go, so their counts are added up by the controller, which stays.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from arkor_ray.placement import CONTROLLER, NAMESPACE
from arkor_ray.telemetry.metrics import REGISTRY, Counter, Exporter, Gauge, Histogram, Metric, Tags

logger = logging.getLogger(__name__)

TICK_S = 1.0
SEND_S = 5.0  # how long an ending process waits for the controller to take its last counts
MAX_OTHER_MODELS = 50  # that have series of their own and no entry in the catalogue
MAX_OBSERVATIONS = 10_000  # kept of one histogram while the controller is away

Key = tuple[str, tuple[tuple[str, str], ...]]


class RayExporter:
    """Into Ray's own metrics; about 2 µs a call.

    Ray exports a gauge once for each time that it is set, and its agents forget one that does not come again; so `again` must
    be called every second or so. That is how the gauges of a process end with it.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._gauges: dict[Key, tuple[Gauge, float, Tags]] = {}

    def count(self, metric: Counter, amount: float, tags: Tags) -> None:
        self._of(metric).inc(amount, tags)

    def set(self, metric: Gauge, value: float, tags: Tags) -> None:
        self._gauges[_key(metric, tags)] = (metric, value, tags)
        self._of(metric).set(value, tags)

    def forget(self, metric: Gauge) -> None:
        for key in [key for key in list(self._gauges) if key[0] == metric.name]:
            self._gauges.pop(key, None)

    def again(self) -> None:
        for metric, value, tags in list(self._gauges.values()):
            self._of(metric).set(value, tags)

    def observe(self, metric: Histogram, value: float, tags: Tags) -> None:
        self._of(metric).observe(value, tags)

    def _of(self, metric: Metric) -> Any:
        made = self._made.get(metric.name)
        return made if made is not None else self._make(metric)

    def _make(self, metric: Metric) -> Any:
        from ray.util import metrics as ray_metrics

        with self._lock:  # a second one of the same name would count apart
            if metric.name not in self._made:
                named = (metric.name, metric.description)
                if isinstance(metric, Histogram):
                    made: Any = ray_metrics.Histogram(*named, boundaries=list(metric.buckets), tag_keys=metric.tags)
                else:
                    kind = ray_metrics.Counter if isinstance(metric, Counter) else ray_metrics.Gauge
                    made = kind(*named, tag_keys=metric.tags)
                self._made[metric.name] = made
            return self._made[metric.name]


@dataclass
class Batch:
    """Counts on their way to the controller."""

    counts: dict[Key, float] = field(default_factory=dict)
    observations: dict[Key, list[float]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.counts or self.observations)

    def count(self, key: Key, amount: float) -> None:
        self.counts[key] = self.counts.get(key, 0.0) + amount

    def observe(self, key: Key, value: float) -> None:
        values = self.observations.setdefault(key, [])
        if len(values) < MAX_OBSERVATIONS:
            values.append(value)

    def add(self, later: Batch) -> None:
        for key, amount in later.counts.items():
            self.count(key, amount)
        for key, values in later.observations.items():
            for value in values:
                self.observe(key, value)

    def replay(self, models: FewModels) -> None:
        """Records it all in this process."""
        for (name, tags), amount in self.counts.items():
            metric = REGISTRY[name]
            assert isinstance(metric, Counter)
            metric.add(amount, **models.in_tags(tags))
        for (name, tags), values in self.observations.items():
            metric = REGISTRY[name]
            assert isinstance(metric, Histogram)
            told = models.in_tags(tags)
            for value in values:
                metric.observe(value, **told)


class FewModels:
    """The values of the tag base_model in a process that stays: names of the catalogue, the first `MAX_OTHER_MODELS` others,
    and "other" for the rest. Where jobs may name any model of the Hub, users would choose how many series there are.
    """

    def __init__(self, catalogue: Iterable[str]) -> None:
        self._listed = frozenset(catalogue)
        self._others: set[str] = set()
        self._lock = threading.Lock()

    def in_tags(self, tags: Iterable[tuple[str, str]]) -> Tags:
        return {key: self._told(value) if key == "base_model" else value for key, value in tags}

    def _told(self, model: str) -> str:
        if model in self._listed:
            return model
        with self._lock:
            if len(self._others) < MAX_OTHER_MODELS:
                self._others.add(model)
            return model if model in self._others else "other"


class ControllerExporter:
    """For the processes of a job: counts and histograms by way of the controller, gauges straight to Ray, which forgets
    them with the process.

    Args:
        send: hands a batch over; with the second argument, returns only when it arrived. Raises where nobody takes it.
    """

    def __init__(self, send: Callable[[Batch, bool], None], gauges: Exporter) -> None:
        self._send = send
        self._gauges = gauges
        self._lock = threading.Lock()
        self._batch = Batch()

    def count(self, metric: Counter, amount: float, tags: Tags) -> None:
        with self._lock:
            self._batch.count(_key(metric, tags), amount)

    def set(self, metric: Gauge, value: float, tags: Tags) -> None:
        self._gauges.set(metric, value, tags)

    def forget(self, metric: Gauge) -> None:
        self._gauges.forget(metric)

    def observe(self, metric: Histogram, value: float, tags: Tags) -> None:
        with self._lock:
            self._batch.observe(_key(metric, tags), value)

    def send(self, *, surely: bool = False) -> None:
        """Hands over what was counted since the last time; what does not arrive is kept for the next."""
        with self._lock:
            batch, self._batch = self._batch, Batch()
        if not batch:
            return
        try:
            self._send(batch, surely)
        except Exception as error:  # whatever keeps the controller from counting must not disturb the job
            logger.debug("The controller does not take counts: %s", error)
            with self._lock:
                batch.add(self._batch)
                self._batch = batch


_collectors: list[Callable[[], None]] = []
_ticking: threading.Thread | None = None


def each_second(collect: Callable[[], None]) -> None:
    """Has `collect` called every second from now on, in a thread: it sets gauges, and counts what is cheaper to count so."""
    global _ticking
    _collectors.append(collect)
    if _ticking is None:
        _ticking = threading.Thread(target=_tick, name="telemetry", daemon=True)
        _ticking.start()


def send_to_controller(batch: Batch, surely: bool) -> None:
    """Raises where there is no controller."""
    import ray

    if not ray.is_initialized():  # else Ray would start a cluster of its own for this call
        raise RuntimeError("this process is not connected to Ray")
    taken: Any = ray.get_actor(CONTROLLER, NAMESPACE).take_counts.remote(batch)
    if surely:
        ray.get(taken, timeout=SEND_S)


def _tick() -> None:
    pause = threading.Event()
    failed: set[Callable[[], None]] = set()
    while not pause.wait(TICK_S):
        for collect in list(_collectors):
            try:
                collect()
            except Exception:  # one that fails must not end the others; it is told once
                if collect not in failed:
                    logger.exception("A metric cannot be collected")
                failed.add(collect)


def _key(metric: Metric, tags: Tags) -> Key:
    return metric.name, tuple(sorted(tags.items()))
