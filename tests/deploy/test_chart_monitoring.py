"""Metrics: they are scraped where Ray exports them, and the dashboard asks for metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ray

from arkor_ray.telemetry import metrics
from tests.deploy.chart import CHART, install

DASHBOARD = json.loads((CHART / "dashboards" / "arkor-ray.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


def asked_for() -> set[str]:
    names = {name for each in EXPRESSIONS for name in re.findall(r"\bray_\w+", each)}
    return {name.removesuffix("_bucket") for name in names}


def test_every_ray_pod_is_scraped_at_the_port_where_ray_exports():
    rendered = install("everything")
    monitor = rendered.the("PodMonitor")
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    for pod in rendered.ray_pods():
        assert monitor["spec"]["selector"]["matchLabels"].items() <= pod.labels.items()
        [port] = [p for p in pod.spec["containers"][0]["ports"] if p["name"] == endpoint["port"]]
        assert port["containerPort"] == 8080
    cluster = rendered.cluster
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert group["rayStartParams"]["metrics-export-port"] == "8080"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_nothing_of_it_is_made_unless_asked():
    assert install("yours").of_kind("PodMonitor") == []
    [catalogue] = install("yours").of_kind("ConfigMap")
    assert "catalogue.yaml" in catalogue["data"]


def test_the_dashboard_reaches_grafana_as_it_is_here():
    config = install("everything").the("ConfigMap", "dashboard")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config["data"]["arkor-ray.json"]) == DASHBOARD


def test_its_own_metrics_are_those_of_the_service_each_with_the_labels_it_has():
    own = {name.removeprefix("ray_") for name in asked_for() if name.startswith("ray_arkor_")}
    assert own == set(metrics.REGISTRY)
    histograms = {name for name, each in metrics.REGISTRY.items() if isinstance(each, metrics.Histogram)}
    for expression in EXPRESSIONS:
        for name, suffix in re.findall(r"\bray_(arkor_\w+?)(_bucket)?\{", expression):
            assert bool(suffix) == (name in histograms), expression
        for labels, name in re.findall(
            r"by \(([^)]*)\) \((?:rate\(|increase\()?ray_(arkor_\w+?)(?:_bucket)?\{", expression
        ):
            assert set(labels.split(", ")) - {"le"} <= set(metrics.REGISTRY[name].tags), expression


def test_the_others_are_on_rays_own_dashboards():
    panels = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    text = "".join(path.read_text() for path in panels.glob("*_panels.py"))
    others = {name for name in asked_for() if not name.startswith("ray_arkor_")}
    assert others and not [name for name in others if not re.search(rf"\b{name}\b", text)]


def test_every_query_is_of_the_chosen_namespace_and_every_legend_of_labels_that_are_left():
    for panel in PANELS:
        for target in panel["targets"]:
            assert target["expr"].count('namespace=~"$namespace"') == len(re.findall(r"\bray_\w+\{", target["expr"]))
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert re.search(rf"by \([^)]*\b{label}\b[^)]*\)", target["expr"]), panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_panels_do_not_lie_over_each_other():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
