"""What the outer folders hold can be handed to its tool: files load, import paths resolve, every folder says what it has."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import yaml

from arkor_ray.client.job_file import load_job_file
from arkor_ray.schemas.job import JobConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_example_jobs_load_and_could_train(path):
    JobConfig.parse(load_job_file(path).config)


@pytest.mark.parametrize("path", sorted((ROOT / "serving").glob("*.yaml")), ids=lambda path: path.name)
def test_serve_configs_fit_serves_schema_and_name_what_exists(path):
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    for application in config.applications:
        module, _, name = application.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


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
