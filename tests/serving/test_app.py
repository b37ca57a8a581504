from __future__ import annotations

import re
import subprocess
import sys

import pytest
from pydantic import ValidationError

from arkor_ray.errors import InvalidRequestError, ModelError
from arkor_ray.serving.app import InferenceArgs, application, application_name, build_app, inference_args
from arkor_ray.settings import Settings


def test_names_are_one_for_each_base_and_precision():
    bases = ("a/b", "a/b@v1", "a/b@v2", "c/b", "/models/b", "/models/b2", "s3://bucket/b")
    names = {application_name(base, precision) for base in bases for precision in ("fp32", "nf4")}
    assert len(names) == 14
    assert all(re.fullmatch(r"inference-[a-z0-9-]+-[0-9a-f]{8}", name) for name in names)
    assert application_name("Org/My_Model.1", "fp32").startswith("inference-my-model-1-")
    assert application_name("Org/My_Model.1@refs/pr/1", "fp32").startswith("inference-my-model-1-")


def test_import_brings_in_neither_torch_nor_ray():
    program = "import sys, arkor_ray.serving.app, arkor_ray.serving.llm_server; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "ray", "peft"} & set(modules)


def test_arguments_come_from_the_settings(tmp_path):
    settings = Settings.load(data_dir=tmp_path, serving_slots=3, serving_rows=5, serving_max_length=77)
    args = inference_args(settings, "/models/base", "nf4")
    assert (args.slots, args.rows, args.max_len, args.base_precision) == (3, 5, 77, "nf4")
    assert args.storage_url == settings.storage_url


def test_what_the_catalogue_says_about_a_base_goes_before_the_settings(tmp_path):
    catalogue = """{models: [
        {name: big, source: a/b, revision: v1, trust_remote_code: true,
         serving: {gpus: 0.5, replicas: 3, slots: 4, rows: 6, max_length: 99}},
        {name: small, source: a/b, serving: {rows: 2}}]}"""
    settings = Settings.load(data_dir=tmp_path, catalogue=catalogue, serving_slots=7, serving_replicas=2)
    big, small = inference_args(settings, "a/b@v1", "bf16"), inference_args(settings, "a/b", "bf16")
    assert (big.num_gpus, big.num_replicas, big.slots, big.rows, big.max_len) == (0.5, 3, 4, 6, 99)
    assert (big.base_model, big.base_name, big.trust_remote_code) == ("a/b@v1", "big", True)
    assert (small.num_gpus, small.num_replicas, small.slots, small.rows) == (None, 2, 7, 2)
    assert not small.trust_remote_code, "code is trusted at the one revision only"


def test_a_base_that_left_the_catalogue_is_served_as_the_settings_say(tmp_path):
    settings = Settings.load(
        data_dir=tmp_path, catalogue="{models: [{name: a/b, revision: v2, trust_remote_code: true}]}"
    )
    args = inference_args(settings, "a/b@v1", "bf16")
    assert (args.base_model, args.trust_remote_code, args.slots) == ("a/b@v1", False, settings.serving_slots)


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
    assert deployment.ray_actor_options == {"num_cpus": 0.01, "num_gpus": 0.0, "label_selector": {}}


def test_an_application_deployed_ahead_is_the_one_that_the_controller_would_start(monkeypatch, tmp_path):
    monkeypatch.setenv("ARKOR_RAY_MODELS", "chat=a/b@v1")
    monkeypatch.setenv("ARKOR_RAY_DATA_DIR", str(tmp_path))
    ahead = application({"application": application_name("a/b@v1", "bf16"), "model": "Chat", "precision": "bf16"})
    started = build_app(inference_args(Settings.load(), "a/b@v1", "bf16"))
    assert ahead._bound_deployment.init_args == started._bound_deployment.init_args
    assert ahead._bound_deployment.ray_actor_options == started._bound_deployment.ray_actor_options


def test_an_application_deployed_ahead_under_another_name_is_refused_with_the_right_one(monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_MODELS", "chat=a/b")
    with pytest.raises(InvalidRequestError, match=application_name("a/b", "bf16")):
        application({"application": application_name("a/b", "fp32"), "model": "chat", "precision": "bf16"})
    with pytest.raises(ModelError, match="ARKOR_RAY_MODELS"):
        application({"application": "inference-x", "model": "other", "precision": "bf16"})
    with pytest.raises(ValidationError, match="precison"):
        application({"application": "inference-x", "model": "chat", "precision": "bf16", "precison": "fp32"})
