from __future__ import annotations

import re
import subprocess
import sys

import pytest
from pydantic import ValidationError

from arkor_ray.serving.app import InferenceArgs, application_name, build_app, inference_args
from arkor_ray.settings import Settings


def test_names_are_one_for_each_base_and_precision():
    names = {application_name(m, p) for m in ("a/b", "c/b", "/models/b", "/models/b2") for p in ("fp32", "nf4")}
    assert len(names) == 8
    assert all(re.fullmatch(r"inference-[a-z0-9-]+-[0-9a-f]{8}", name) for name in names)
    assert application_name("Org/My_Model.1", "fp32").startswith("inference-my-model-1-")


def test_import_brings_in_neither_torch_nor_ray():
    program = "import sys, arkor_ray.serving.app, arkor_ray.serving.llm_server; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "ray", "peft"} & set(modules)


def test_arguments_come_from_the_settings(tmp_path):
    settings = Settings.load(data_dir=tmp_path, serving_slots=3, serving_rows=5, serving_max_length=77)
    args = inference_args(settings, "/models/base", "nf4")
    assert (args.slots, args.rows, args.max_len, args.base_precision) == (3, 5, 77, "nf4")
    assert args.storage_url == settings.storage_url


def test_arguments_that_cannot_work_are_refused():
    with pytest.raises(ValidationError):
        InferenceArgs(base_model="a/b", base_precision="int3", storage_url="file:///x", cache_dir="/y")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        InferenceArgs(base_model="a/b", base_precision="fp32", storage_url="file:///x", cache_dir="/y", slots=0)


def test_application_asks_for_no_cpu():
    args = InferenceArgs(
        base_model="a/b", base_precision="fp32", storage_url="file:///x", cache_dir="/y", num_replicas=2
    )
    deployment = build_app(args)._bound_deployment
    assert deployment.name == "LLMServer"
    assert deployment.num_replicas == 2
    assert deployment.ray_actor_options == {"num_cpus": 0, "num_gpus": 0.0}
