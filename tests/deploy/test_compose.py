"""The compose file: everything it refers to exists, only the API is published, and only for this machine."""

from __future__ import annotations

import re

import pytest
import yaml

from arkor_ray.settings import Settings
from tests.deploy.files import CLUSTER, ROOT, variables

TEXT = (CLUSTER / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
EXAMPLE = variables(CLUSTER / "compose.env.example")


def networks(service: dict) -> set[str]:
    return set(service["networks"])


def test_only_the_api_is_published_and_only_on_loopback():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"head": ["127.0.0.1:8000:8000"]}
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert networks(SERVICES["postgres"]) == networks(SERVICES["s3"]) == {"inside"}


def test_every_secret_must_be_filled_in_and_the_example_has_none():
    used = dict(re.findall(r"\$\{(\w+)(:?[?-][^}]*)?\}", TEXT))
    assert used.keys() == EXAMPLE.keys()
    assert {name for name, value in EXAMPLE.items() if value} == {"TORCH_INDEX"}
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert {name for name, rest in used.items() if not rest.startswith(":?fill it in")} == {"HF_TOKEN", "TORCH_INDEX"}
    for service in SERVICES.values():
        for name, value in service["environment"].items():
            if re.search(r"TOKEN|PASSWORD|SECRET", name):
                assert re.fullmatch(r"\$\{\w+:.*\}", value), name


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_refers_to_is_there(name):
    service = SERVICES[name]
    assert networks(service) <= COMPOSE["networks"].keys()
    named = {volume.partition(":")[0] for volume in service.get("volumes", []) if not volume.startswith("/")}
    assert named <= COMPOSE["volumes"].keys()
    for other, needed in service.get("depends_on", {}).items():
        if needed["condition"] == "service_healthy":
            assert SERVICES[other]["healthcheck"]["test"]
        if needed["condition"] == "service_completed_successfully":
            assert SERVICES[other]["restart"] == "no"
    if service["image"] == "arkor-ray:all":
        assert service["pull_policy"] == "never"
    else:
        assert re.search(r":v?\d", service["image"]), "without a version it is another image tomorrow"


def test_one_service_builds_the_image_and_whoever_runs_it_waits_for_that_one():
    """Builds of one tag at the same time get into each other's way."""
    runs = {name for name, service in SERVICES.items() if service["image"] == "arkor-ray:all"}
    (builder,) = (name for name, service in SERVICES.items() if "build" in service)
    assert builder in runs
    assert all(builder in SERVICES[name]["depends_on"] for name in runs - {builder})
    build = SERVICES[builder]["build"]
    assert (CLUSTER / build["context"] / build["dockerfile"]).samefile(CLUSTER / "Dockerfile")
    assert (CLUSTER / build["context"]).samefile(ROOT)


def test_a_torch_with_cuda_is_chosen_where_the_build_reads_it():
    """Empty means PyPI's build, so only an absent variable may stand for the Dockerfile's own choice."""
    argument = SERVICES["bucket"]["build"]["args"]["TORCH_INDEX"]
    default = re.search(r"^ARG TORCH_INDEX=(.+)$", (CLUSTER / "Dockerfile").read_text(), re.M).group(1)
    assert argument == f"${{TORCH_INDEX-{default}}}"
    assert EXAMPLE["TORCH_INDEX"] == default


@pytest.mark.parametrize("name", ["head", "worker"])
def test_rays_object_store_is_half_of_shared_memory(name):
    """Unless it is told, Ray takes a share of the machine's memory, and the disk for it where /dev/shm is smaller."""
    (store,) = (
        int(m.group(1)) for word in SERVICES[name]["command"] if (m := re.match(r"--object-store-memory=(\d+)", word))
    )
    assert store == int(SERVICES[name]["shm_size"].removesuffix("gb")) * 2**30 // 2


@pytest.mark.parametrize("name", ["head", "worker"])
def test_the_nodes_settings_are_those_of_a_cluster_with_tokens(name, monkeypatch):
    for variable, value in SERVICES[name]["environment"].items():
        filled = "a/b" if variable == "ARKOR_RAY_MODELS" else r"\1"
        monkeypatch.setenv(variable, re.sub(r"\$\{(\w+):[?-][^}]*\}", filled, value))
    settings = Settings.load()
    assert settings.cluster
    assert not settings.anonymous
    assert settings.database_url == "postgresql://arkor:POSTGRES_PASSWORD@postgres/arkor"
    assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"
    assert SERVICES[name]["read_only"]
    assert {volume.rpartition(":")[2] for volume in SERVICES[name]["volumes"]} == {"/var/lib/arkor-ray", "/tmp"}
    assert SERVICES[name]["cap_drop"] == ["ALL"]


def test_the_bucket_is_the_one_that_the_service_uses():
    (program,) = (part for part in SERVICES["bucket"]["command"] if "create_bucket" in part)
    compile(program, "bucket", "exec")
    storage = SERVICES["head"]["environment"]["ARKOR_RAY_STORAGE_URL"]
    assert f'create_bucket(Bucket="{storage.split("/")[2]}")' in program
