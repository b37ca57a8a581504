"""Names and tags as Prometheus and its users expect them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from arkor_ray.telemetry import metrics
from arkor_ray.telemetry.metrics import REGISTRY, Counter, Gauge, Histogram, Metric

EVERY = pytest.mark.parametrize("metric", REGISTRY.values(), ids=list(REGISTRY))


@EVERY
def test_names_follow_the_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"arkor_[a-z]+(_[a-z]+)*", metric.name) or metric.name == "arkor_jobs"
    assert isinstance(metric, Counter) == metric.name.endswith("_total")
    assert metric.description.endswith(".")
    assert len(set(metric.tags)) == len(metric.tags)


@EVERY
def test_nothing_that_stays_has_a_tag_with_endless_values(metric: Metric) -> None:
    assert isinstance(metric, Gauge) or not {"job_id", "adapter_id", "path", "token"} & set(metric.tags)


def test_buckets_rise_and_are_in_a_base_unit() -> None:
    histograms = [metric for metric in REGISTRY.values() if isinstance(metric, Histogram)]
    assert len(histograms) > 5
    for metric in histograms:
        assert metric.name.endswith(("_seconds", "_bytes"))
        assert list(metric.buckets) == sorted(set(metric.buckets)) and metric.buckets[0] > 0


def test_the_operators_page_lists_every_metric() -> None:
    page = Path(__file__).parents[2] / "cluster" / "OBSERVABILITY.md"
    rows = dict(re.findall(r"^\| `ray_(arkor_\w+)` \| (.*) \|$", page.read_text(), re.MULTILINE))
    described = {
        metric.name: f"{type(metric).__name__.lower()} | {', '.join(f'`{tag}`' for tag in metric.tags)} | {metric.description}"
        for metric in REGISTRY.values()
    }
    assert rows == described


def test_a_name_is_there_once() -> None:
    with pytest.raises(AssertionError, match="there twice"):
        Counter("arkor_api_requests_total", "Again.")


def test_without_an_exporter_measuring_does_nothing() -> None:
    assert metrics._exporter is None
    metrics.JOB_ATTEMPTS.add()
    metrics.JOBS.set(1, status="queued")
    metrics.CONTROLLER_TURN_SECONDS.observe(0.1)


def test_no_increase_is_no_record(recorded) -> None:
    metrics.JOB_ATTEMPTS.add(0)
    assert recorded.all(metrics.JOB_ATTEMPTS) == []
