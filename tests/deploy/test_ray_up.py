"""The files for `ray up`: Ray's own checks, and what arkor-ray needs of a cluster."""

from __future__ import annotations

import os
import re

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from arkor_ray.placement import ROLE_LABEL
from arkor_ray.settings import Settings
from tests.deploy.files import CLUSTER, EXTRAS, ROOT, variables

FILES = sorted(CLUSTER / name for name in ("aws.yaml", "gcp.yaml", "on_prem.yaml"))
EXAMPLE = CLUSTER / "arkor.env.example"


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def config(request) -> dict:
    """As `ray up` sees it, with Ray's defaults filled in. Raises what Ray finds wrong."""
    written = yaml.safe_load(request.param.read_text())
    prepared = prepare_config(written)
    validate_config(prepared)
    return prepared


def commands(config: dict) -> list[str]:
    own = [c for each in config["available_node_types"].values() for c in each.get("worker_setup_commands", [])]
    keys = ("setup_commands", "head_setup_commands", "worker_setup_commands")
    return own + [c for key in (*keys, "head_start_ray_commands", "worker_start_ray_commands") for c in config[key]]


def test_the_head_does_no_work(config):
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"].get("CPU") == 0 or "--num-cpus=0" in config["head_start_ray_commands"][0]
    assert not head["resources"].get("GPU")


def test_every_kind_of_node_has_a_role_or_every_node_has_all_extras(config):
    """What a node may be asked to run, it must be able to import."""
    needed = {"control-plane": set(), "training": {"train"}, "serving": {"serve"}}
    with_roles = config["provider"]["type"] != "local"
    for name, kind in config["available_node_types"].items():
        setup = config["head_setup_commands"] if name == config["head_node_type"] else kind.get("worker_setup_commands")
        (command,) = setup or config["worker_setup_commands"]
        extras = set(re.search(r"setup_node\.sh ([\w,]+)", command).group(1).split(","))
        assert extras <= EXTRAS
        if with_roles:
            assert extras == {"server", "s3", "postgres", "otel"} | needed[kind["labels"][ROLE_LABEL]]
        else:
            assert extras == {"all"}
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert ("ARKOR_RAY_NODE_ROLES=1" in command) == with_roles


def test_there_is_a_gpu_to_train_and_one_to_serve_before_anybody_asks(config):
    """Whether a job asks for a GPU depends on whether there is one, so Ray must not take them all away."""
    if config["provider"]["type"] == "local":
        assert len(config["provider"]["worker_ips"]) >= 1
        return
    kinds = {kind["labels"][ROLE_LABEL]: kind for kind in config["available_node_types"].values()}
    assert kinds["control-plane"]["min_workers"] >= 1, "the head has no CPU for anybody"
    for role in ("training", "serving"):
        assert 1 <= kinds[role]["min_workers"] < kinds[role]["max_workers"]
    assert config["max_workers"] >= sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())


def test_an_image_of_aws_is_an_id_that_the_heads_role_can_start_workers_from():
    """resolve:ssm:… needs ssm:GetParameters of whoever starts the machine, and Ray's role for the head has EC2 and S3 alone."""
    kinds = yaml.safe_load((CLUSTER / "aws.yaml").read_text())["available_node_types"]
    readme = (CLUSTER / "README.md").read_text()
    for kind in kinds.values():
        # EC2 refuses what is no id, and shows it. Ray's own choice where there is none has a glibc too old for torch.
        assert re.fullmatch(
            r"ami-[0-9a-f]{17}|fill in an AMI .*, see cluster/README.md", kind["node_config"]["ImageId"]
        )
    assert "aws ssm get-parameters" in readme and "# IamInstanceProfile" in readme


def test_only_our_own_commands_run(config):
    for command in commands(config):
        (script,) = re.findall(r"~/arkor-ray/(cluster/\w+\.sh)", command)
        assert os.access(ROOT / script, os.X_OK)


def test_the_repository_and_the_environment_are_brought_to_every_node(config):
    assert config["file_mounts"] == {"~/arkor-ray": ".", "~/arkor.env": "cluster/arkor.env"}
    assert "arkor.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_no_secret_and_no_open_port_is_in_a_file():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"TOKEN|PASSWORD|SECRET|postgresql://", text)
        assert "IpPermissions" not in text


def test_the_environment_has_no_values_to_forget_and_is_safe_where_it_has_one():
    example = variables(EXAMPLE)
    assert {name: value for name, value in example.items() if value} == {
        "ARKOR_RAY_CLUSTER": "1",
        "ARKOR_RAY_ANONYMOUS": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    known = {f"ARKOR_RAY_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in example if name.startswith("ARKOR_RAY_")} <= known
