"""The service that the chart starts: its settings, its Serve application, Ray's groups, hooks and budgets."""

from __future__ import annotations

import re
import tomllib
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from arkor_ray.cli.main import COMMANDS
from arkor_ray.settings import Settings
from tests.deploy.chart import CHART, EVERYTHING, INSTALLS, ROOT, YOURS, Rendered, install, render, with_values

EVERY_INSTALL = pytest.mark.parametrize("name", INSTALLS)
# Ray Serve's proxies listen where serveConfigV2 says, and the chart's Ray always asks for a token.
NOT_ON_A_CLUSTER = {"host", "port", "allow_ray_without_token"}


@pytest.fixture
def load_settings(monkeypatch, tmp_path):
    """What a Ray pod's process reads. Secrets stand in for themselves."""

    def load(rendered: Rendered) -> Settings:
        stand_ins = {"ARKOR_RAY_DATABASE_URL": "postgresql://arkor:Xk3v9Qm2Lp7Zt4Wn@db/arkor"}
        catalogue = tmp_path / "catalogue.yaml"
        catalogue.write_text(rendered.the("ConfigMap", "catalogue")["data"]["catalogue.yaml"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "Xk3v9Qm2Lp7Zt4Wn")
        for name, each in rendered.ray_pods()[0].environment().items():
            if name.startswith("ARKOR_RAY_"):
                monkeypatch.setenv(name, each.get("value") or stand_ins[name])
        monkeypatch.setenv("ARKOR_RAY_CATALOGUE", str(catalogue))
        return Settings.load()

    return load


@EVERY_INSTALL
def test_the_variables_are_settings_that_the_service_accepts(name, load_settings):
    values = INSTALLS[name]
    settings = load_settings(install(name))
    assert settings.cluster
    assert settings.anonymous == values.get("anonymous", False)
    assert settings.storage_url.startswith("s3://")
    assert [each.name for each in settings.catalogue.models] == [each["name"] for each in values.get("models", [])]
    for field, value in values.get("settings", {}).items():
        assert getattr(settings, field) == value


def test_addresses_come_from_the_ingress_unless_they_are_given(load_settings):
    settings = load_settings(install("everything"))
    assert settings.endpoint_url("triage") == "https://triage.models.example.com/v1"
    assert settings.api_url == "https://arkor.example.com"
    assert load_settings(render(with_values(EVERYTHING, publicUrl="https://x.example.com/"))).api_url == (
        "https://x.example.com"
    )


def test_the_api_knows_its_services_names_by_which_clients_inside_and_the_test_reach_it(load_settings):
    """With anonymous tokens it refuses every other name."""
    rendered = install("everything")
    service = rendered.the("Service", "-api")["metadata"]["name"]
    known = load_settings(rendered).host_names.split(",")
    assert known == [service, *(f"{service}.team{end}" for end in ("", ".svc", ".svc.cluster.local"))]
    tested = rendered.the("Pod", "test")["spec"]["containers"][0]["env"]
    [url] = [each["value"] for each in tested if each["name"] == "API"]
    assert urlsplit(url).hostname in known


def test_every_setting_can_be_made_from_the_chart():
    """A new field of Settings belongs into `settings` of values.schema.json, if it is not a value of its own."""
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    named = set(schema["properties"]["settings"]["properties"])
    own = {
        each["name"].removeprefix("ARKOR_RAY_").lower()
        for each in install("everything").ray_pods()[0].spec["containers"][0]["env"]
        if each["name"].startswith("ARKOR_RAY_")
    } - set(EVERYTHING["settings"])
    assert named | own | NOT_ON_A_CLUSTER == set(Settings.model_fields)
    assert not named & own


@EVERY_INSTALL
def test_all_nodes_have_the_same_settings_and_write_to_volumes(name):
    rendered = install(name)
    pods = rendered.ray_pods()
    ours = [{k: v for k, v in pod.environment().items() if k.startswith(("ARKOR_RAY_", "AWS_"))} for pod in pods]
    assert all(each == ours[0] for each in ours)
    for pod in pods:
        [container] = [c for c in pod.spec["containers"] if c["name"] != "autoscaler"]
        writable = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
        assert {"/tmp", "/dev/shm"} <= set(writable)
        for variable in ("HOME", "HF_HOME", "ARKOR_RAY_DATA_DIR", "ARKOR_RAY_CACHE_DIR"):
            path = pod.environment()[variable]["value"]
            assert any(path == each or path.startswith(f"{each}/") for each in writable), variable
        assert pod.environment()["USER"]["value"]  # getpass.getuser, for a uid that the image does not know
        [catalogue] = [m for m in container["volumeMounts"] if m["name"] == "catalogue"]
        assert pod.environment()["ARKOR_RAY_CATALOGUE"]["value"] == f"{catalogue['mountPath']}/catalogue.yaml"


def test_another_catalogue_has_another_name_and_the_running_clusters_stays():
    """A pod that the cluster adds after an upgrade must not read another one than the pods that are there."""
    before = install("yours").the("ConfigMap", "catalogue")
    after = render(with_values(YOURS, models=[{"name": "acme/chat"}])).the("ConfigMap", "catalogue")
    assert before["metadata"]["name"] != after["metadata"]["name"]
    for each in (before, after):
        assert each["immutable"] is True
        assert each["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    for name in ("yours", "everything"):
        made = install(name).the("ConfigMap", "catalogue")["metadata"]["name"]
        for pod in install(name).ray_pods():
            [mounted] = [v["configMap"]["name"] for v in pod.spec["volumes"] if "configMap" in v]
            assert mounted == made


def serve_config(rendered: Rendered) -> dict[str, Any]:
    return yaml.safe_load(rendered.ray_service["spec"]["serveConfigV2"])


def test_the_serve_application_is_that_of_the_serving_folder():
    """But for the spread: of the nodes there nobody knows how many there are."""
    config = serve_config(install("yours"))
    del config["applications"][0]["args"]["max_replicas_per_node"]
    assert config == yaml.safe_load((ROOT / "serving" / "config.yaml").read_text())


@EVERY_INSTALL
def test_replicas_of_the_api_share_no_pod_and_have_as_many_as_they_need(name):
    args = serve_config(install(name))["applications"][0]["args"]
    replicas = INSTALLS[name].get("api", {}).get("replicas", 2)
    assert args["num_replicas"] == str(replicas)
    assert args.get("max_replicas_per_node") == ("1" if replicas > 1 else None)
    assert install(name).groups().get("cpu", {"minReplicas": 1})["minReplicas"] >= replicas


def test_versions_are_those_of_the_package_and_of_what_it_is_tested_with():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == project["version"]
    [ray] = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert install("yours").cluster["rayVersion"] == ray


def test_an_upgrade_does_not_replace_the_cluster_under_running_jobs():
    assert install("yours").ray_service["spec"]["upgradeStrategy"] == {"type": "None"}
    # With a name of our own a new cluster would wake up with the actors and jobs of the one before.
    assert "externalStorageNamespace" not in install("yours").cluster["gcsFaultToleranceOptions"]


@EVERY_INSTALL
def test_the_head_takes_no_work(name):
    parameters = install(name).cluster["headGroupSpec"]["rayStartParams"]
    assert (parameters["num-cpus"], parameters["num-gpus"]) == ("0", "0")


@EVERY_INSTALL
def test_kuberays_own_services_still_find_its_pods(name):
    """They look for app.kubernetes.io/name=kuberay, which a label of ours would replace."""
    for pod in install(name).ray_pods():
        ours = {key for key in pod.template["metadata"]["labels"] if re.match(r"ray\.io/|app\.kubernetes\.io/", key)}
        assert ours == {"app.kubernetes.io/instance", "app.kubernetes.io/component"}


@EVERY_INSTALL
def test_the_object_store_fits_into_shared_memory_with_room_for_nccl(name):
    cluster = install(name).cluster
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        [memory] = [v["emptyDir"] for v in group["template"]["spec"]["volumes"] if v["name"] == "shared-mem"]
        assert memory["medium"] == "Memory"
        shared = int(memory["sizeLimit"].removesuffix("Gi")) * 2**30
        assert int(group["rayStartParams"]["object-store-memory"]) == shared // 2


def gpus_of(rendered: Rendered, count: str) -> int:
    return sum(
        group[count] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
        for group in rendered.groups().values()
    )


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("values-kind.yaml", 0, 0), ("values-one-gpu.yaml", 1, 1), ("values-100-gpus.yaml", 10, 100), ("yours", 2, 6)],
)
def test_the_values_files_have_the_gpus_that_they_say(name, least, most):
    assert (gpus_of(install(name), "minReplicas"), gpus_of(install(name), "maxReplicas")) == (least, most)


def test_groups_are_a_map_that_can_be_changed_added_to_and_cut():
    groups = install("everything").groups()
    assert list(groups) == ["cpu", "gpu-serving", "gpu-training", "h100"]
    h100 = groups["h100"]["template"]["spec"]["containers"][0]
    assert h100["resources"]["limits"] == {"memory": "900Gi", "nvidia.com/gpu": "8", "rdma/hca": "8"}
    assert groups["gpu-training"]["template"]["spec"]["nodeSelector"] == {"gpu": "a100"}
    assert "nodeSelector" not in groups["gpu-serving"]["template"]["spec"]
    assert list(install("values-kind.yaml").groups()) == ["cpu"]
    groups = {"gpu-training": None, "gpu-serving": {"minReplicas": 2}}
    cut = render(with_values(YOURS, nodeRoles=False, workerGroups=groups))
    assert list(cut.groups()) == ["cpu", "gpu-serving"]


@EVERY_INSTALL
def test_with_roles_each_part_finds_pods_of_its_own_and_without_them_all_pods_are_alike(name):
    rendered = install(name)
    cluster = rendered.cluster
    on = rendered.ray_pods()[0].environment()["ARKOR_RAY_NODE_ROLES"]["value"]
    assert on == ("1" if INSTALLS[name].get("nodeRoles", True) else "0")
    assert cluster["headGroupSpec"]["labels"] == {"arkor-ray/role": "control-plane"}
    if on == "1":
        roles = {group["labels"]["arkor-ray/role"] for group in cluster["workerGroupSpecs"]}
        assert roles == {"control-plane", "training", "serving"}


def test_ray_is_told_how_many_gpus_a_pod_has_whatever_their_resource_is_called():
    """Its autoscaler counts what ends in gpu; NVIDIA's slices do not."""
    rendered = render(
        with_values(YOURS, gpuResource="nvidia.com/mig-3g.40gb", workerGroups={"gpu-training": {"gpus": 2}})
    )
    told = {name: group["rayStartParams"].get("num-gpus") for name, group in rendered.groups().items()}
    assert told == {"cpu": None, "gpu-training": "2", "gpu-serving": "1"}
    [training] = rendered.groups()["gpu-training"]["template"]["spec"]["containers"]
    assert training["resources"]["limits"]["nvidia.com/mig-3g.40gb"] == "2"


def test_amounts_may_be_numbers_and_reach_ray_as_strings():
    """Its custom resources take no number with a fraction."""
    resources = {"requests": {"cpu": 0.5}, "limits": {"memory": 8589934592, "ephemeral-storage": 2**31}}
    rendered = render(with_values(EVERYTHING, head={"resources": resources}, migration={"resources": resources}))
    amounts = {
        "requests": {"cpu": "0.5", "memory": "8Gi"},
        "limits": {"memory": "8589934592", "ephemeral-storage": "2147483648"},
    }
    assert rendered.ray_pods()[0].spec["containers"][0]["resources"] == amounts
    [migrate] = rendered.the("Job", "migrate")["spec"]["template"]["spec"]["containers"]
    assert migrate["resources"]["requests"]["cpu"] == "0.5"


def test_a_variable_is_there_once_and_the_groups_wins_over_everybodys_and_the_charts():
    """Kubernetes refuses a second one of a name, after the database has been migrated."""
    mine = [{"name": "HF_TOKEN", "value": "group"}, {"name": "NCCL_DEBUG", "value": "INFO"}]
    everybodys = [{"name": name, "value": "all"} for name in ("NCCL_DEBUG", "HF_HOME", "HF_TOKEN")]
    rendered = render(with_values(EVERYTHING, extraEnv=everybodys, workerGroups={"h100": {"extraEnv": mine}}))
    for pod in rendered.ray_pods():
        names = [each["name"] for each in pod.spec["containers"][0]["env"]]
        assert len(set(names)) == len(names), pod.owner
        nearest = "group" if pod.owner == "RayService/h100" else "all"
        assert pod.environment()["HF_TOKEN"] == {"name": "HF_TOKEN", "value": nearest}
        assert pod.environment()["HF_HOME"]["value"] == "all"
        assert pod.environment()["NCCL_DEBUG"]["value"] == ("INFO" if nearest == "group" else "all")


def test_a_role_may_have_an_image_of_its_own_and_the_hooks_take_the_heads():
    rendered = install("values-100-gpus.yaml")
    images = {pod.owner: pod.spec["containers"][0]["image"].rpartition(":")[2] for pod in rendered.pods()}
    assert images == {
        "RayService/head": "0.1.0-control-plane",
        "RayService/cpu": "0.1.0-control-plane",
        "RayService/gpu-training": "0.1.0-training",
        "RayService/gpu-serving": "0.1.0-serving",
        "Job/rel-arkor-ray-migrate": "0.1.0-control-plane",
        "Pod/rel-arkor-ray-test": "0.1.0-control-plane",
    }
    everything = {pod.owner: pod.spec["containers"][0]["image"] for pod in install("everything").ray_pods()}
    assert everything["RayService/h100"].endswith("arkor-ray:training")
    assert everything["RayService/head"].endswith("arkor-ray@sha256:" + "0" * 64)


def test_with_autoscaling_ray_decides_between_the_bounds_and_without_it_there_is_one_size():
    assert install("yours").cluster["autoscalerOptions"]["version"] == "v2"
    sizes = {"gpu-training": {"minReplicas": 3, "maxReplicas": 3}, "gpu-serving": {"maxReplicas": 1}}
    fixed = render(with_values(YOURS, autoscaling={"enabled": False}, workerGroups=sizes))
    assert "autoscalerOptions" not in fixed.cluster
    sizes = {
        name: [group[key] for key in ("replicas", "minReplicas", "maxReplicas")]
        for name, group in fixed.groups().items()
    }
    assert sizes == {"cpu": [2, 2, 2], "gpu-serving": [1, 1, 1], "gpu-training": [3, 3, 3]}


def test_kueue_is_told_on_the_service():
    metadata = install("everything").ray_service["metadata"]
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "ml"
    assert metadata["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    assert metadata["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert not [key for key in install("yours").ray_service["metadata"]["labels"] if "kueue" in key]


@EVERY_INSTALL
def test_budgets_are_whole_numbers_and_no_pod_is_in_two(name):
    """Pods of a RayCluster have no scale, so Kubernetes cannot count percentages; and two budgets refuse every eviction."""
    rendered = install(name)
    budgets = [each["spec"] for each in rendered.of_kind("PodDisruptionBudget")]
    for pod in rendered.ray_pods():
        mine = [b for b in budgets if b["selector"]["matchLabels"].items() <= pod.labels.items()]
        assert len(mine) <= 1
    for budget in budgets:
        assert isinstance(budget["minAvailable"], int) and "maxUnavailable" not in budget


def test_training_is_never_evicted_serving_keeps_one_and_a_group_may_go_without():
    budgets = {e["metadata"]["name"]: e["spec"] for e in install("values-100-gpus.yaml").of_kind("PodDisruptionBudget")}
    assert budgets["rel-arkor-ray-gpu-training"]["minAvailable"] == 12
    assert "unhealthyPodEvictionPolicy" not in budgets["rel-arkor-ray-gpu-training"]
    assert budgets["rel-arkor-ray-gpu-serving"]["minAvailable"] == 1
    # There is one head: with a budget no drain of its node would end.
    assert "rel-arkor-ray-head" not in budgets
    assert install("values-one-gpu.yaml").of_kind("PodDisruptionBudget") == []


def test_your_database_is_migrated_before_anything_is_made_and_ours_after():
    for name, hooks in (("yours", "pre-install,pre-upgrade"), ("everything", "post-install,post-upgrade")):
        job = install(name).the("Job", "migrate")
        assert job["metadata"]["annotations"]["helm.sh/hook"] == hooks
        pod = job["spec"]["template"]["spec"]
        program, command, *options = pod["containers"][0]["command"]
        assert program == "arkor-ray" and command in COMMANDS and options == ["--wait", "300"]
        assert job["spec"]["activeDeadlineSeconds"] > 300
        # Before an install there is nothing of the chart's to refer to.
        assert "serviceAccountName" not in pod
    assert render(with_values(YOURS, migration={"enabled": False})).of_kind("Job") == []


@pytest.mark.parametrize("name", ["yours", "everything"])
def test_the_settings_accept_what_the_migration_is_given(name, monkeypatch):
    """The image may say ARKOR_RAY_CLUSTER=1, which asks for a storage as well."""
    monkeypatch.setenv("ARKOR_RAY_CLUSTER", "1")
    for variable, each in next(pod for pod in install(name).pods() if pod.component == "migrate").environment().items():
        monkeypatch.setenv(variable, each.get("value") or "postgresql://arkor:Xk3v9Qm2Lp7Zt4Wn@db/arkor")
    assert Settings.load().database_url.startswith("postgresql://")


def test_the_hooks_replace_what_an_earlier_one_left():
    hooks = [e for e in install("everything").objects if "helm.sh/hook" in e["metadata"].get("annotations", {})]
    assert {each["kind"] for each in hooks} == {"Job", "Pod"}
    for each in hooks:
        assert "before-hook-creation" in each["metadata"]["annotations"]["helm.sh/hook-delete-policy"]


@pytest.mark.parametrize("name", ["values-one-gpu.yaml", "values-100-gpus.yaml"])
def test_whoever_has_gpus_is_told_to_build_with_a_torch_that_can_use_them(name):
    assert gpus_of(install(name), "maxReplicas") > 0
    assert "--build-arg TORCH_INDEX=" in (CHART / name).read_text()
    assert "--build-arg TORCH_INDEX=" in (ROOT / "helm" / "README.md").read_text()


def test_the_redis_of_a_try_out_reads_its_password_from_its_environment():
    [container] = install("everything").the("StatefulSet", "redis")["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["sh", "-c"]
    assert "requirepass $REDISCLI_AUTH" in container["command"][2]
    assert "appendonly yes" in container["command"][2]


def test_the_notes_say_how_the_first_token_is_made_and_where_to_go():
    assert "arkor-ray tokens issue admin --org main" in install("yours").notes
    assert "The catalogue is empty" in install("yours").notes
    assert "https://SLUG.models.example.com/v1" in install("everything").notes
    assert "whoever reaches the API gets a token" in install("everything").notes
    assert "port-forward service/rel-arkor-ray-api 8000:80" in install("values-kind.yaml").notes
    assert "delete raycluster" not in install("yours").notes  # only after an upgrade
