"""Helm's linter, the chart's schema and the schemas of every kind accept what the chart makes of each values file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import helm_python as helm
import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.chart import CHART, INSTALLS, ROOT, VALUES_FILES, YOURS, install, render

OLDEST, NEWEST = "1.29", "1.37"  # that Chart.yaml admits, and whose schemas are at hand
CUSTOM_KINDS = json.loads((ROOT / "tests" / "deploy" / "custom_kinds.json").read_text())


def _container(**fields: Any) -> dict[str, Any]:
    spec = {"containers": [{"name": "x", "image": "x", **fields}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}


# For the parts of custom kinds that are core types: an object of Kubernetes' own that holds one.
WRAPPED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "PodTemplateSpec": lambda part: {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": {"name": "x"},
        "template": part,
    },
    "ObjectMeta": lambda part: {"apiVersion": "v1", "kind": "ConfigMap", "metadata": part},
    "ResourceRequirements": lambda part: _container(resources=part),
    "SecurityContext": lambda part: _container(securityContext=part),
    "EnvVar": lambda part: _container(env=[part]),
    "EnvVarSource": lambda part: _container(env=[{"name": "x", "valueFrom": part}]),
}


def core_parts(schema: dict[str, Any], instance: Any) -> Iterator[tuple[str, Any]]:
    """Each part of `instance` that `schema` says is a core type, with the type's name."""
    if found := re.match(r"core/v1 (\w+)", schema.get("$comment", "")):
        yield found[1], instance
    elif isinstance(instance, dict):
        for key, value in instance.items():
            if below := schema.get("properties", {}).get(key):
                yield from core_parts(below, value)
    elif isinstance(instance, list):
        for value in instance:
            yield from core_parts(schema.get("items", {}), value)


def check(each: dict[str, Any], version: str = OLDEST) -> None:
    """Raises where the object has a field that its kind does not know, or lacks one that it needs."""
    if each["kind"] in CUSTOM_KINDS:
        schema = CUSTOM_KINDS[each["kind"]]
        jsonschema.validate(each, schema)
        for name, part in core_parts(schema, each):
            check(WRAPPED[name](part), version)
        return
    kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize(("name", "version"), [*((name, OLDEST) for name in INSTALLS), ("everything", NEWEST)])
def test_every_object_is_valid_and_has_its_name_to_itself(name, version):
    objects = install(name).objects
    for each in objects:
        check(each, version)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(names)) == len(names)
    assert not [name for _, name in names if len(name) > 63]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec, cluster: spec.update(serveConfig="x"),
        lambda spec, cluster: spec["upgradeStrategy"].update(type="Never"),
        lambda spec, cluster: cluster["authOptions"].update(mode="basic"),
        lambda spec, cluster: cluster["autoscalerOptions"].update(version="v3"),
        lambda spec, cluster: cluster["autoscalerOptions"]["securityContext"].update(readonly=True),
        lambda spec, cluster: cluster["headGroupSpec"]["template"]["spec"].update(serviceLinks=False),
        lambda spec, cluster: cluster["workerGroupSpecs"][0].pop("maxReplicas"),
        lambda spec, cluster: cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"].update(secretRef="x"),
    ],
)
def test_the_check_itself_is_strict(spoil):
    service = deepcopy(install("everything").ray_service)
    spoil(service["spec"], service["spec"]["rayClusterConfig"])
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(service)


@pytest.mark.parametrize("name", INSTALLS)
def test_helm_lints_it_strictly(name):
    report = helm.lint(CHART, INSTALLS[name], strict=True)
    assert report["errors"] == []
    assert [each["error"] for each in report["messages"]] == ["icon is recommended"]


def test_the_schema_and_the_default_values_know_the_same_names():
    schema = json.loads((CHART / "values.schema.json").read_text())
    definitions = schema["definitions"]

    def compare(schema: dict[str, Any], values: Any, path: str) -> None:
        if "$ref" in schema:
            schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
        known = schema.get("properties")
        # An empty mapping stands for what Kubernetes, the service or podDefaults take; the head says only what differs.
        if not known or not values or path == ".head":
            return
        assert schema["additionalProperties"] is False, path
        assert set(values) == set(known) - {"global"}, path
        for key, value in values.items():
            compare(known[key], value, f"{path}.{key}")

    compare(schema, yaml.safe_load((CHART / "values.yaml").read_text()), "")


@pytest.mark.parametrize("name", VALUES_FILES)
def test_the_readme_says_what_each_values_file_is_for(name):
    assert f"`{name}`" in (ROOT / "helm" / "README.md").read_text()


def test_the_least_install_is_what_the_readme_asks_for():
    text = (ROOT / "helm" / "README.md").read_text()
    block = next(part for part in re.findall(r"```yaml\n(.*?)```", text, re.S) if "existingSecret" in part)
    given = yaml.safe_load(block)
    assert set(YOURS) <= set(given)
    render(given)
