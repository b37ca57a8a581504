"""A place for metrics that a test can look into."""

from __future__ import annotations

from collections import defaultdict

from arkor_ray.telemetry.metrics import Counter, Gauge, Histogram, Metric, Tags


class Recorded:
    """An Exporter that keeps everything, and refuses tags other than those that the metric names."""

    def __init__(self) -> None:
        self._values: dict[str, dict[frozenset[tuple[str, str]], list[float]]] = defaultdict(lambda: defaultdict(list))

    def count(self, metric: Counter, amount: float, tags: Tags) -> None:
        assert amount > 0, "counters only grow"
        self._keep(metric, amount, tags)

    def set(self, metric: Gauge, value: float, tags: Tags) -> None:
        self._keep(metric, value, tags)

    def forget(self, metric: Gauge) -> None:
        self._values.pop(metric.name, None)

    def observe(self, metric: Histogram, value: float, tags: Tags) -> None:
        self._keep(metric, value, tags)

    def total(self, metric: Counter, **tags: str) -> float:
        """Over all series whose tags include these."""
        return sum(self.all(metric, **tags))

    def now(self, metric: Gauge, **tags: str) -> float:
        """The value last set with exactly these tags."""
        return self._values[metric.name][frozenset(tags.items())][-1]

    def all(self, metric: Metric, **tags: str) -> list[float]:
        """Everything recorded with tags that include these."""
        wanted = set(tags.items())
        return [value for have, values in self._values[metric.name].items() if wanted <= have for value in values]

    def _keep(self, metric: Metric, value: float, tags: Tags) -> None:
        assert set(tags) == set(metric.tags), f"{metric.name} has the tags {metric.tags}, not {tuple(tags)}"
        assert all(isinstance(value, str) for value in tags.values()), tags
        self._values[metric.name][frozenset(tags.items())].append(value)
