"""The chart rendered by Helm's own engine, and views of what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "arkor-ray"
RELEASE, NAMESPACE = "rel", "team"

# The least that is yours: everything that must be given, and nothing else.
YOURS: dict[str, Any] = {
    "image": {"repository": "registry.example.com/arkor-ray"},
    "database": {"existingSecret": {"name": "my-database"}},
    "storage": {"url": "s3://bucket/prefix", "existingSecret": {"name": "my-s3"}},
    "gcsFaultTolerance": {"redisAddress": "redis://redis.example.com:6379", "existingSecret": {"name": "my-redis"}},
}
# Every switch on that the values files leave off.
EVERYTHING: dict[str, Any] = {
    "image": {"repository": "registry.example.com/arkor-ray", "digest": "sha256:" + "0" * 64},
    "imagePullSecrets": [{"name": "registry"}],
    "anonymous": True,
    "endpoints": {"domain": "models.example.com"},
    "models": [{"name": "acme/chat", "revision": "v1", "aliases": ["chat"], "serving": {"replicas": 2, "gpus": 0.5}}],
    "allowAnyHubModel": True,
    "settings": {"datasets_max_bytes": 2**31, "cancel_grace_s": 12.5, "datasets_allow_private_hosts": False},
    "hub": {"existingSecret": {"name": "hub"}, "offline": True},
    "extraEnv": [{"name": "NCCL_DEBUG", "value": "WARN"}],
    "ingress": {"enabled": True, "host": "arkor.example.com", "tls": {"secretName": "a", "endpointsSecretName": "b"}},
    "postgresql": {"enabled": True, "volume": {"storageClass": "fast"}},
    "redis": {"enabled": True},
    "objectStore": {"enabled": True},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:x"}},
    "kueue": {"queueName": "ml", "priorityClass": "high", "elastic": True},
    "podDefaults": {
        "priorityClassName": "ml",
        "runtimeClassName": "nvidia",
        "podAnnotations": {"a": "b"},
        "podLabels": {"team": "ml"},
        "scratch": {"size": "1Ti", "storageClass": "nvme"},
        "extraVolumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    },
    "workerGroups": {
        "h100": {
            "role": "training",
            "imageTag": "training",
            "gpus": 8,
            "minReplicas": 0,
            "maxReplicas": 2,
            "resources": {"requests": {"cpu": 90, "memory": "900Gi"}, "limits": {"memory": "900Gi", "rdma/hca": 8}},
        },
        "gpu-training": {"extraEnv": [{"name": "NCCL_IB_DISABLE", "value": "1"}], "nodeSelector": {"gpu": "a100"}},
    },
    "networkPolicy": {"egress": {"enabled": True, "rules": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]}},
    "monitoring": {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "grafanaDashboard": {"enabled": True},
    },
}


def values_file(name: str) -> dict[str, Any]:
    return yaml.safe_load((CHART / name).read_text())


VALUES_FILES = sorted(path.name for path in CHART.glob("values-*.yaml"))
INSTALLS: dict[str, dict[str, Any]] = {
    "yours": YOURS,
    "everything": EVERYTHING,
    # The image is what each reader has under another name, if at all.
    **{name: {"image": {"repository": "arkor-ray"}, **values_file(name)} for name in VALUES_FILES},
}


def with_values(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of `base` with `changes` merged in, mappings into mappings as Helm does."""

    def merge(into: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        for key, value in more.items():
            into[key] = (
                merge(into[key], value) if isinstance(value, dict) and isinstance(into.get(key), dict) else value
            )
        return into

    return merge(deepcopy(base), changes)


@dataclass(frozen=True)
class Pod:
    """A pod template, where it came from, and the labels that it will run with."""

    owner: str
    template: dict[str, Any]
    labels: dict[str, str]

    @property
    def spec(self) -> dict[str, Any]:
        return self.template["spec"]

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    def environment(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in self.spec["containers"][0].get("env", [])}


class Rendered:
    """The objects of one install, hooks included."""

    def __init__(self, files: dict[str, str]) -> None:
        self.notes = next(text for path, text in files.items() if path.endswith("NOTES.txt"))
        self.objects: list[dict[str, Any]] = [
            each
            for path, text in files.items()
            if not path.endswith("NOTES.txt")
            for each in yaml.safe_load_all(text)
            if each
        ]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.objects if each["kind"] == kind]

    def the(self, kind: str, name: str = "") -> dict[str, Any]:
        [found] = [each for each in self.of_kind(kind) if name in each["metadata"]["name"]]
        return found

    @property
    def ray_service(self) -> dict[str, Any]:
        return self.the("RayService")

    @property
    def cluster(self) -> dict[str, Any]:
        return self.ray_service["spec"]["rayClusterConfig"]

    def groups(self) -> dict[str, dict[str, Any]]:
        return {each["groupName"]: each for each in self.cluster["workerGroupSpecs"]}

    def ray_pods(self) -> list[Pod]:
        """With the labels that KubeRay adds, and the autoscaler's container that it puts beside the head."""
        cluster = self.cluster
        head = deepcopy(cluster["headGroupSpec"]["template"])
        if cluster["enableInTreeAutoscaling"]:
            options = cluster["autoscalerOptions"]
            autoscaler = {key: options[key] for key in ("env", "resources", "securityContext", "volumeMounts")}
            head["spec"]["containers"].append({"name": "autoscaler", "image": "as the head's", **autoscaler})
        templates = [("head", head), *((name, group["template"]) for name, group in self.groups().items())]
        return [
            Pod(f"RayService/{name}", template, {**template["metadata"]["labels"], "ray.io/serve": "true"})
            for name, template in templates
        ]

    def pods(self) -> list[Pod]:
        def others() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
            for each in self.objects:
                if each["kind"] in ("Job", "StatefulSet", "Deployment", "DaemonSet"):
                    yield each, each["spec"]["template"]
                elif each["kind"] == "Pod":
                    yield each, {"metadata": each["metadata"], "spec": each["spec"]}

        return self.ray_pods() + [
            Pod(f"{each['kind']}/{each['metadata']['name']}", template, template["metadata"]["labels"])
            for each, template in others()
        ]


def render(values: dict[str, Any]) -> Rendered:
    """What `helm install` would make, the schema's verdict included. Raises helm.HelmError."""
    return Rendered(loaded().render(values, name=RELEASE, namespace=NAMESPACE, is_install=True))


@cache
def loaded() -> helm.Chart:
    return helm.Chart.load(CHART)


@cache
def install(name: str) -> Rendered:
    """One of INSTALLS; rendered once, for reading only."""
    return render(INSTALLS[name])
