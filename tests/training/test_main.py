"""How a stored job becomes what the train loop is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from arkor_ray.catalogue import read_catalogue
from arkor_ray.errors import ModelError
from arkor_ray.settings import Settings
from arkor_ray.training.job_spec import JobSpec
from arkor_ray.training.main import make_spec

CATALOGUE = (
    "{models: [{name: house, source: a/b, revision: v1, aliases: [Gemma], trust_remote_code: true}, {name: c/d}]}"
)


def spec_of(tmp_path: Path, model: str) -> JobSpec:
    settings = Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache", catalogue=read_catalogue(CATALOGUE))
    config = {"model": model, "datasetSource": {"type": "huggingface", "name": "a/rows"}}
    return make_spec("job", 1, config, None, settings)


def test_a_job_is_given_the_base_that_the_catalogue_has_for_its_name(tmp_path):
    spec = spec_of(tmp_path, "GEMMA")
    assert (spec.base_model, spec.trust_remote_code, spec.config.model) == ("a/b@v1", True, "GEMMA")
    assert spec.model_cache == tmp_path / "cache" / "models"
    files = spec.base_files()
    assert (files.source, files.options) == ("a/b", {"revision": "v1", "trust_remote_code": True, "name": "GEMMA"})


def test_code_is_trusted_for_the_entry_that_says_so_alone(tmp_path):
    assert not spec_of(tmp_path, "c/d").trust_remote_code


def test_a_model_that_has_left_the_catalogue_is_told(tmp_path):
    with pytest.raises(ModelError, match="house, Gemma, c/d"):
        spec_of(tmp_path, "a/b")
