"""What the outer folders hold can be handed to its tool: files load, import paths resolve, every folder says what it has."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from arkor_ray.client.job_file import load_job_file
from arkor_ray.embedded import free_ports
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


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_the_job_scripts_load_at_once_and_fit_on_a_screen(path):
    assert callable(script(path).main)
    assert len(path.read_text().splitlines()) <= 85


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("job", "sentence"),
    [("nonesuch.yaml", "submit: Cannot read /"), ("examples/triage.yaml", "submit: Cannot reach http://")],
)
def test_submit_says_in_a_sentence_what_is_in_its_way(job, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ARKOR_CLOUD_API_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    assert script(ROOT / "jobs" / "submit.py").main([str(ROOT / "jobs" / job)]) == 1
    assert capsys.readouterr().err.startswith(sentence)


DATA = sorted((ROOT / "jobs" / "examples" / "data").glob("*.jsonl"))


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.name)
def test_example_data_asks_and_answers(path):
    from arkor_ray.training.questions import questions_of, read_rows

    rows = read_rows(str(path))
    questions, refused = questions_of(rows)
    assert len(questions) >= 16 and not refused
    assert all(question.answer for question in questions.values())


@pytest.mark.parametrize("name", ["triage", "translate", "redaction"])
def test_what_is_held_out_is_not_trained_on_and_a_job_file_names_the_rest(name):
    from arkor_ray.training.questions import questions_of, read_rows

    folder = ROOT / "jobs" / "examples" / "data"
    asked = {
        part: {question.messages[-1]["content"] for question in questions_of(read_rows(str(folder / part)))[0].values()}
        for part in (f"{name}.train.jsonl", f"{name}.heldout.jsonl")
    }
    train, held_out = asked.values()
    assert len(train) >= 60 and not train & held_out
    source = load_job_file(folder.parent / f"{name}.yaml").config["datasetSource"]
    assert source["url"] == (folder / f"{name}.train.jsonl").as_uri()


def test_the_example_schema_accepts_the_answers_wanted():
    import jsonschema

    from arkor_ray.training.questions import questions_of, read_rows

    folder = ROOT / "jobs" / "examples"
    schema = json.loads((folder / "redaction.schema.json").read_text())
    questions, _ = questions_of(read_rows(str(folder / "data" / "redaction.heldout.jsonl")))
    for question in questions.values():
        jsonschema.validate(json.loads(question.answer), schema)


@pytest.mark.parametrize("folder", ["cluster", "jobs", "serving", "helm"])
def test_every_outer_folder_has_a_readme_that_names_its_files(folder):
    text = (ROOT / folder / "README.md").read_text()
    for path in (ROOT / folder).iterdir():
        if path.is_file() and path.name != "README.md":
            assert path.name in text
