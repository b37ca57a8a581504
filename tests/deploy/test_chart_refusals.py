"""Values that would make no service, or one that only looks well, are refused with a sentence that says what to set."""

from __future__ import annotations

from typing import Any

import helm_python as helm
import pytest

from arkor_ray.catalogue import Catalogue
from arkor_ray.schemas.model import CatalogueEntry
from tests.deploy.chart import EVERYTHING, NAMESPACE, YOURS, loaded, render, values_file, with_values

TLS = {"enabled": True, "host": "arkor.example.com"}


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(helm.HelmError) as caught:
        render(values)
    return str(caught.value)


def test_an_install_without_anything_says_what_it_needs_first():
    said = refusal({})
    for words in (
        "image.repository: name the image",
        "A PostgreSQL is needed: give yours by database.existingSecret.name",
        "An S3 storage is needed",
        "A Redis, in which Ray's state outlives its head, is needed",
    ):
        assert f"\n- {words}" in said
    assert "arkor-ray/templates/validate.yaml" in said, "and not where a file was that needed the value first"


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ({"image": {"repository": ""}}, "image.repository: name the image"),
        ({"database": {"existingSecret": {"name": ""}}}, "postgresql.enabled=true makes a small one"),
        ({"storage": {"url": ""}}, "An S3 storage is needed: give yours by storage.url"),
        ({"storage": {"existingSecret": {"name": ""}}}, "storage.existingSecret.name: name the Secret with the keys"),
        ({"gcsFaultTolerance": {"redisAddress": ""}}, "or set gcsFaultTolerance.enabled=false"),
        ({"gcsFaultTolerance": {"existingSecret": {"name": ""}}}, "name the Secret with the password of"),
        ({"ingress": {"enabled": True}}, "ingress.host: the name by which clients reach the API"),
        ({"ingress": TLS}, "ingress.tls.secretName: name the certificate's Secret; tokens must not travel in clear"),
        (
            {"ingress": TLS | {"tls": {"secretName": "x"}}, "endpoints": {"domain": "models.example.com"}},
            "with the certificate of *.models.example.com",
        ),
    ],
)
def test_what_is_missing_is_named(missing, words):
    assert words in refusal(with_values(YOURS, **missing))


@pytest.mark.parametrize(
    ("contradiction", "words"),
    [
        ({"postgresql": {"enabled": True}}, "A PostgreSQL is given twice: postgresql.enabled=true and"),
        ({"objectStore": {"enabled": True}}, "An S3 storage is given twice"),
        ({"redis": {"enabled": True}}, "A Redis, in which Ray's state outlives its head, is given twice"),
        (
            {"gcsFaultTolerance": {"enabled": False}, "redis": {"enabled": True}},
            "redis.enabled=true has no use with gcsFaultTolerance.enabled=false",
        ),
        (
            {"gcsFaultTolerance": {"enabled": False}},
            "gcsFaultTolerance.redisAddress has no use with gcsFaultTolerance.enabled=false",
        ),
        (
            {"gcsFaultTolerance": {"redisAddress": ""}, "redis": {"enabled": True}},
            "gcsFaultTolerance.existingSecret.name has no use with redis.enabled=true",
        ),
        (
            {"objectStore": {"enabled": True}, "storage": {"url": "", "endpointUrl": "http://s3.example.com"}},
            "storage.endpointUrl has no use with objectStore.enabled=true",
        ),
        (
            {"objectStore": {"enabled": True}, "storage": {"url": ""}},
            "storage.existingSecret.name has no use with objectStore.enabled=true",
        ),
        (
            {"objectStore": {"enabled": True}, "storage": {"url": "", "workloadIdentity": True}},
            "storage.workloadIdentity=true has no use with objectStore.enabled=true",
        ),
        (
            {"storage": {"workloadIdentity": True}},
            "storage.existingSecret.name has no use with storage.workloadIdentity=true",
        ),
        (
            {"rayAuth": {"existingSecret": "mine", "token": "f1c0ffee5ca1ab1e0ddba11d"}},
            "Ray's token is given twice: rayAuth.existingSecret and rayAuth.token",
        ),
        ({"kueue": {"priorityClass": "high"}}, "kueue.queueName: name the LocalQueue"),
        (
            {"autoscaling": {"enabled": False}, "workerGroups": {"gpu-training": {"minReplicas": 0}}},
            "workerGroups.gpu-training: with autoscaling.enabled=false a group keeps the size that it begins with: give "
            "minReplicas and maxReplicas the same number, not 0 and 4",
        ),
        (
            {"workerGroups": {"gpu-training": {"resources": {"limits": {"nvidia.com/gpu": 8}}}}},
            "workerGroups.gpu-training.resources.limits: nvidia.com/gpu is not given here; say how many by "
            "workerGroups.gpu-training.gpus",
        ),
        (
            {
                "gpuResource": "example.com/accelerator",
                "head": {"resources": {"limits": {"example.com/accelerator": 1}}},
            },
            "head.resources.limits: example.com/accelerator is not given here; the head takes no work",
        ),
        (
            {"workerGroups": {"cpu": {"extraVolumes": [{"name": "tmp", "emptyDir": {}}]}}},
            "workerGroups.cpu.extraVolumes: there is a volume tmp already; choose another name",
        ),
        (
            {"podDefaults": {"extraVolumeMounts": [{"name": "home", "mountPath": "/tmp"}]}},
            "head.extraVolumeMounts: a volume is mounted at /tmp already; choose another path",
        ),
        (
            {"podDefaults": {"extraVolumeMounts": [{"name": "models", "mountPath": "/models"}]}},
            "head.extraVolumeMounts: there is no volume models; name it in extraVolumes",
        ),
        (
            {"api": {"replicas": 3}},
            "api.replicas: each of the 3 has a pod to itself, and just 2 are always there (minReplicas of the groups with role "
            "control-plane)",
        ),
        (
            {"nodeRoles": False, "workerGroups": {"cpu": {"minReplicas": 0}}, "api": {"replicas": 3}},
            "api.replicas: each of the 3 has a pod to itself, and just 2 are always there (minReplicas of the groups);",
        ),
        ({"kueue": {"queueName": "ml"}}, "set autoscaling.enabled=false, or kueue.elastic=true"),
        (
            {"workerGroups": {"cpu": {"minReplicas": 9}}},
            "workerGroups.cpu: minReplicas 9 is more than maxReplicas 2",
        ),
        (
            {"workerGroups": {"cpu": {"resources": {"limits": None}}}},
            "workerGroups.cpu.resources: give requests.cpu and",
        ),
        ({"head": {"resources": {"requests": None}}}, "head.resources: give requests.cpu and limits.memory"),
        ({"extraEnv": [{"name": "ARKOR_RAY_PORT", "value": "1"}]}, "- extraEnv: ARKOR_RAY_PORT is set by the chart"),
        (
            {"extraEnv": [{"name": "AWS_DEFAULT_REGION", "value": "x"}]},
            "extraEnv: AWS_DEFAULT_REGION is set by the chart",
        ),
        (
            {"workerGroups": {"cpu": {"extraEnv": [{"name": "RAY_AUTH_MODE", "value": "disabled"}]}}},
            "workerGroups.cpu.extraEnv: RAY_AUTH_MODE is set by the chart",
        ),
    ],
)
def test_what_contradicts_itself_is_named(contradiction, words):
    assert words in refusal(with_values(YOURS, **contradiction))


@pytest.mark.parametrize(
    ("training", "serving", "words"),
    [
        ((0, 4), (0, 2), "there may be 6 GPUs but none needs to be"),
        ((0, 4), (1, 2), "there may be 6 GPUs but only one needs to be"),
        ((0, 0), (1, 1), None),
        ((0, 0), (0, 0), None),
        ((1, 4), (1, 2), None),
    ],
)
def test_gpus_that_ray_would_never_ask_for_are_refused(training, serving, words):
    """What a worker asks for depends on how many GPUs the cluster has: with none it asks for none."""
    bounds = {"gpu-training": training, "gpu-serving": serving}
    groups = {name: {"minReplicas": least, "maxReplicas": most} for name, (least, most) in bounds.items()}
    values = with_values(YOURS, nodeRoles=False, workerGroups=groups)
    if words is None:
        render(values)
    else:
        assert words in refusal(values)


def test_a_release_whose_name_kuberay_would_not_take_is_refused():
    with pytest.raises(helm.HelmError, match=r"1st\.release-arkor-ray cannot be the name of a Ray cluster"):
        loaded().render(YOURS, name="1st.release", namespace=NAMESPACE)


def test_names_leave_kuberay_room_for_its_suffixes():
    """It takes 47 characters for a RayService."""
    [manifest] = [
        text for path, text in loaded().render(YOURS, name="r" * 53).items() if path.endswith("/rayservice.yaml")
    ]
    assert f"\n  name: {'r' * 40}\n" in manifest


def test_a_cluster_without_any_worker_is_refused():
    groups = {name: {"minReplicas": 0, "maxReplicas": 0} for name in ("cpu", "gpu-training", "gpu-serving")}
    assert "the head takes no work: nothing could run" in refusal(with_values(YOURS, workerGroups=groups))


def test_roles_without_pods_and_pods_without_a_role_are_refused():
    assert "no group with role serving has pods" in refusal(
        with_values(YOURS, workerGroups={"gpu-serving": {"role": "training"}})
    )
    group = {"maxReplicas": 1, "minReplicas": 0, "resources": {"requests": {"cpu": 1}, "limits": {"memory": "1Gi"}}}
    more = with_values(YOURS, workerGroups={"more": group})
    assert "workerGroups.more: nodeRoles=true and the group has no role" in refusal(more)
    render(more | {"nodeRoles": False})


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([{"name": "acme/chat"}, {"name": "Acme/Chat"}], 'models: "Acme/Chat" is there twice'),
        (
            [{"name": "acme/chat"}, {"name": "acme/other", "aliases": ["ACME/chat"]}],
            'models: "ACME/chat" is there twice',
        ),
        ([{"name": "acme/chat", "aliases": ["house", "House"]}], 'models: "House" is there twice'),
        ([{"name": "acme/my chat"}], 'models: "acme/my chat" is not a Hub id (owner/name)'),
        ([{"name": "house"}], 'models: "house" is not a Hub id (owner/name)'),
        (
            [
                {"name": "house", "source": "s3://b/m"},
                {"name": "acme/chat", "aliases": ["chat"]},
                {"name": "/models/x"},
            ],
            None,
        ),
    ],
)
def test_a_catalogue_that_the_service_would_not_start_with_is_refused(models, words):
    if words is None:
        render(with_values(YOURS, models=models))
    else:
        assert words in refusal(with_values(YOURS, models=models))
        with pytest.raises(ValueError):
            Catalogue.of(CatalogueEntry.model_validate(each) for each in models)


PATHS = [("rayAuth", "token"), ("postgresql", "password"), ("redis", "password"), ("objectStore", "secretKey")]
PLACEHOLDERS = ["change-me", "Password123", "minioadmin", "my-secret-token", "xxxxxxxxxxxxxxxxxxxx", "your_password"]


@pytest.mark.parametrize(
    ("section", "key", "secret"),
    [(*path, "change-me") for path in PATHS[1:]] + [(*PATHS[0], secret) for secret in PLACEHOLDERS],
)
def test_a_placeholder_is_refused_by_its_path_and_not_repeated(section, key, secret):
    said = refusal(with_values(EVERYTHING, **{section: {key: secret}}))
    assert f"{section}.{key} is a placeholder that anybody would guess" in said
    assert secret not in said


def test_a_short_secret_is_refused_and_a_random_one_is_taken():
    assert "redis.password has 9 characters" in refusal(with_values(EVERYTHING, redis={"password": "k3v9Qm2Lp"}))
    render(with_values(EVERYTHING, redis={"password": "f1c0ffee5ca1ab1e0ddba11deadbeef0"}))


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ({"ingres": {}}, "'ingres' not allowed"),
        ({"settings": {"max_runing_jobs": 8}}, "'max_runing_jobs' not allowed"),
        ({"settings": {"database_url": "sqlite:///x"}}, "'database_url' not allowed"),
        ({"models": [{"name": "a/b", "replicas": 2}]}, "'replicas' not allowed"),
        ({"workerGroups": {"cpu": {"maxReplica": 2}}}, "'maxReplica' not allowed"),
        ({"workerGroups": {"head": {"maxReplicas": 2}}}, "invalid propertyName 'head'"),
        ({"podDefaults": {"keepAvailable": "some"}}, "/podDefaults/keepAvailable"),
        ({"podDefaults": {"podLabels": {"app.kubernetes.io/name": "x"}}}, "app.kubernetes.io/name"),
        ({"podSecurity": {"runAsUser": 0}}, "/podSecurity/runAsUser"),
        ({"endpoints": {"domain": "https://models.example.com"}}, "/endpoints/domain"),
        ({"ingress": {"host": "*.example.com"}}, "/ingress/host"),
        ({"storage": {"url": "file:///data"}}, "/storage/url"),
        ({"gcsFaultTolerance": {"redisAddress": "redis://:pw@redis:6379"}}, "/gcsFaultTolerance/redisAddress"),
        ({"anonymous": "false"}, "/anonymous"),
        ({"podDefaults": {"scratch": {"size": "50GB"}}}, "/podDefaults/scratch/size"),
        ({"networkPolicy": {"egress": {"dns": {"to": []}}}}, "/networkPolicy/egress/dns/to"),
    ],
)
def test_a_typo_is_an_error(mistake, words):
    assert words in refusal(with_values(YOURS, **mistake))


def test_a_values_file_does_not_hide_what_only_you_know():
    assert "image.repository" in refusal(values_file("values-one-gpu.yaml"))
