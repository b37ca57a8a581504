"""helm/README.md can be followed from top to bottom: what a command uses is there before it, by the names of the chart."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.deploy.chart import CHART, NAMESPACE, RELEASE, ROOT, YOURS, install, render, values_file, with_values

TEXT = (ROOT / "helm" / "README.md").read_text()
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
S3 = VALUES["storage"]["existingSecret"]


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("database.env", {VALUES["database"]["existingSecret"]["key"]}),
        ("s3.env", {S3["accessKeyIdKey"], S3["secretAccessKeyKey"]}),
        ("redis.env", {VALUES["gcsFaultTolerance"]["existingSecret"]["passwordKey"]}),
    ],
)
def test_a_file_with_secrets_is_shown_before_it_is_used_with_the_keys_that_the_chart_reads(file, keys):
    shown = re.search(rf"^# {re.escape(file)}\n((?:[A-Za-z_]+=.*\n)+)", TEXT, re.M)
    assert {line.partition("=")[0] for line in shown[1].splitlines()} == keys
    assert shown.end() < TEXT.index(f"--from-env-file={file}")


def test_the_values_are_there_before_the_command_that_takes_them_and_name_the_secrets_that_are_made():
    block = re.search(r"```yaml\n(.*?)```", TEXT, re.S)
    assert "my-values.yaml" in TEXT[: block.start()]
    assert block.end() < TEXT.index("-f my-values.yaml")
    named = set(re.findall(r"existingSecret: \{name: ([\w-]+)\}", block[1]))
    assert named == set(re.findall(r"create secret generic ([\w-]+)", TEXT))


def test_helm_is_given_the_time_that_its_hooks_and_its_test_may_take():
    (install_s, test_s) = (
        int(re.search(rf"^helm {command} .*--timeout (\d+)m$", TEXT, re.M).group(1)) * 60
        for command in ("upgrade --install", "test")
    )
    jobs = install("everything").of_kind("Job")
    assert jobs and install_s >= max(each["spec"]["activeDeadlineSeconds"] for each in jobs)
    [test] = [pod for pod in install("yours").pods() if pod.component == "test"]
    waits = int(test.environment()["WAIT"]["value"])
    assert test_s == waits + 60, "in which its pod starts; Helm alone would not say what is not ready"
    assert TEXT.index("get rayservice") < TEXT.index("helm test"), "or it waits for images that are still to come"


@pytest.mark.parametrize(("waits", "minutes"), [(840, 15), (841, 16), (3600, 61)])
def test_the_notes_give_helm_the_time_that_the_test_may_take(waits, minutes):
    notes = render(with_values(YOURS, test={"waitSeconds": waits})).notes
    assert f"helm -n {NAMESPACE} test {RELEASE} --timeout {minutes}m" in notes


def test_the_laptops_commands_use_the_image_and_the_service_that_its_values_name():
    image = "{repository}:{tag}".format_map(values_file("values-kind.yaml")["image"])
    block = next(part for part in re.findall(r"^```\w*\n(.*?)^```", TEXT, re.M | re.S) if "kind load" in part)
    steps = [
        f"docker build -f cluster/Dockerfile --target all -t {image} .",
        f"kind load docker-image {image}",
        "helm install kuberay-operator",
        "-f helm/arkor-ray/values-kind.yaml --timeout 20m",
        "kubectl -n arkor-ray port-forward service/arkor-ray-api 8000:80",
    ]
    assert [block.index(step) for step in steps] == sorted(block.index(step) for step in steps)
    assert f"port-forward service/{RELEASE}-arkor-ray-api 8000:80" in install("values-kind.yaml").notes


def test_the_disk_that_pods_request_is_that_of_the_default_values():
    said = re.search(r"by default\n(\w+) for a pod that trains, (\w+) for one that answers, (\w+) for the others", TEXT)
    pods = {pod.owner: pod.spec["containers"][0]["resources"] for pod in install("yours").ray_pods()}
    owners = ("gpu-training", "gpu-serving", "cpu", "head")
    requested = [pods[f"RayService/{name}"]["requests"]["ephemeral-storage"] for name in owners]
    assert requested == [*said.groups(), said[3]]


def test_the_key_of_each_secret_of_yours_is_told():
    assert f"`hub.existingSecret`, key `{VALUES['hub']['existingSecret']['key']}`" in TEXT
