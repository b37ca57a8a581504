"""What the outer folders hold can be handed to its tool: files load, import paths resolve, every folder says what it has."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import yaml

from arkor_ray.client.job_file import load_job_file
from arkor_ray.schemas.job import JobConfig
from arkor_ray.service import APPLICATION
from arkor_ray.serving.app import DEPLOYMENT, application, application_name
from arkor_ray.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_example_jobs_load_and_could_train(path):
    JobConfig.parse(load_job_file(path).config)


SERVE_CONFIGS = sorted((ROOT / "serving").glob("*.yaml"))


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=lambda path: path.name)
def test_serve_configs_fit_serves_schema_and_name_what_exists(path):
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    for each in config.applications:
        module, _, name = each.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=lambda path: path.name)
def test_serve_configs_have_the_control_plane_and_what_is_deployed_ahead_is_found_by_it(path, monkeypatch, tmp_path):
    control_plane, *ahead = yaml.safe_load(path.read_text())["applications"]
    assert (control_plane["name"], control_plane["route_prefix"]) == (APPLICATION, "/")
    assert bool(ahead) == (path.name != "config.yaml")
    monkeypatch.setenv("ARKOR_RAY_DATA_DIR", str(tmp_path))
    for each in ahead:
        assert each["route_prefix"] is None, "it would answer whoever asks"
        monkeypatch.setenv("ARKOR_RAY_MODELS", each["args"]["model"])
        assert each["name"] == application_name(
            Settings.load().resolve_model(each["args"]["model"]), each["args"]["precision"]
        )
        assert application(each["args"])._bound_deployment.name == DEPLOYMENT


def test_the_job_script_loads():
    spec = importlib.util.spec_from_file_location("finetune", ROOT / "jobs" / "finetune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)


@pytest.mark.parametrize("folder", ["cluster", "jobs", "serving", "helm"])
def test_every_outer_folder_has_a_readme_that_names_its_files(folder):
    text = (ROOT / folder / "README.md").read_text()
    for path in (ROOT / folder).iterdir():
        if path.is_file() and path.name != "README.md":
            assert path.name in text
