"""Ray's pods on their machines: which of them share one, what they take of its disk, and how they end."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from ray._private import ray_constants

from tests.deploy.chart import CHART, INSTALLS, YOURS, Pod, install, render, with_values

EVERY_INSTALL = pytest.mark.parametrize("name", INSTALLS)
ANTI_AFFINITY = {
    "podAntiAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"arkor-ray/group": "cpu"}}}
        ]
    }
}


def ray_pod(values: dict[str, Any], name: str) -> Pod:
    [pod] = [each for each in render(values).ray_pods() if each.owner == f"RayService/{name}"]
    return pod


def gib(quantity: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", quantity).groups()
    powers = "kMGTPE".index(unit[0].replace("K", "k")) + 1
    return float(number) * (1024 if unit.endswith("i") else 1000) ** powers / 2**30


def requested(pod: Pod) -> str | None:
    return pod.spec["containers"][0]["resources"].get("requests", {}).get("ephemeral-storage")


@pytest.mark.parametrize(("has_roles", "spread"), [(True, {"cpu"}), (False, {"cpu", "gpu-training", "gpu-serving"})])
def test_pods_that_may_hold_the_api_are_put_on_different_machines_if_that_can_be(has_roles, spread):
    for pod in render(with_values(YOURS, nodeRoles=has_roles)).ray_pods():
        name = pod.owner.removeprefix("RayService/")
        constraints = pod.spec.get("topologySpreadConstraints", [])
        assert bool(constraints) == (name in spread)
        for each in constraints:
            assert (each["topologyKey"], each["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
            assert each["labelSelector"]["matchLabels"].items() <= pod.labels.items()
            assert each["labelSelector"]["matchLabels"]["arkor-ray/group"] == name


def test_what_the_values_say_of_a_groups_place_is_taken_as_it_is():
    own = [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}]
    given = ray_pod(with_values(YOURS, workerGroups={"cpu": {"topologySpreadConstraints": own}}), "cpu")
    assert given.spec["topologySpreadConstraints"] == own
    apart = ray_pod(with_values(YOURS, workerGroups={"cpu": {"affinity": ANTI_AFFINITY}}), "cpu")
    assert apart.spec["affinity"] == ANTI_AFFINITY and "topologySpreadConstraints" not in apart.spec
    arm = {"matchExpressions": [{"key": "kubernetes.io/arch", "operator": "In", "values": ["arm64"]}]}
    nodes = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [arm]}}}
    assert "topologySpreadConstraints" in ray_pod(with_values(YOURS, podDefaults={"affinity": nodes}), "cpu").spec


@EVERY_INSTALL
def test_no_pod_fills_its_machines_disk(name):
    for pod in install(name).pods():
        for volume in pod.spec["volumes"]:
            if "emptyDir" in volume:
                assert gib(volume["emptyDir"]["sizeLimit"]) > 0, (pod.owner, volume["name"])


@EVERY_INSTALL
def test_the_disk_that_a_pod_is_to_fill_is_requested_of_its_machine(name):
    """Those that took more than they requested are the first to go when a disk fills up."""
    for pod in install(name).ray_pods():
        filled = [
            gib(volume["emptyDir"]["sizeLimit"])
            for volume in pod.spec["volumes"]
            if volume["name"] in ("scratch", "model-cache", "ray-temp") and "emptyDir" in volume
        ]
        assert filled
        assert requested(pod) == f"{math.ceil(sum(filled))}Gi", pod.owner
        # Each volume has a limit of its own; one for all would evict a pod that keeps to them.
        assert "ephemeral-storage" not in pod.spec["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "25Gi"),
        ({"scratch": {"size": "1.5Ti"}}, "1551Gi"),
        ({"scratch": {"size": "500M"}, "modelCache": {"size": "2048Ki"}}, "6Gi"),
        ({"scratch": {"storageClass": "nvme"}}, "15Gi"),
        ({"scratch": {"storageClass": "nvme"}, "modelCache": {"existingClaim": "models"}}, "5Gi"),
        ({"resources": {"requests": {"ephemeral-storage": "7Gi"}}}, "7Gi"),
        ({"resources": {"limits": {"ephemeral-storage": "7Gi"}}}, None),  # Kubernetes requests the limit
    ],
)
def test_volumes_take_nothing_of_a_machines_disk_and_an_amount_that_is_given_is_taken(changes, expected):
    base = with_values(YOURS, head={"scratch": {"size": "10Gi"}, "modelCache": {"size": "10Gi"}})
    assert requested(ray_pod(with_values(base, head=changes), "head")) == expected


def test_a_pod_for_training_may_have_what_its_machines_network_needs():
    """As a comment in the values for a hundred GPUs, which not every machine has."""
    text = (CHART / "values-100-gpus.yaml").read_text()
    efa = dict(re.findall(r"^ +#   (\S+): (\S+)$", text, re.M))
    assert set(efa) == {"vpc.amazonaws.com/efa", "hugepages-2Mi"}
    values = with_values(
        INSTALLS["values-100-gpus.yaml"], workerGroups={"gpu-training": {"resources": {"limits": efa}}}
    )
    assert efa.items() <= ray_pod(values, "gpu-training").spec["containers"][0]["resources"]["limits"].items()


@EVERY_INSTALL
def test_a_pod_that_is_to_end_has_ended_before_kubernetes_kills_it(name):
    """Ray would drain it for half a minute first, and the wait for requests comes before that."""
    assert ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S >= 0, "the variable is that of Ray"
    for pod in install(name).ray_pods():
        drain = float(pod.environment()["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]["value"])
        [_, wait] = pod.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert float(wait) + drain + 20 <= pod.spec["terminationGracePeriodSeconds"]
