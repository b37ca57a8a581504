"""What the service reads at start: defaults that hang together, and sentences for what cannot work."""

from __future__ import annotations

import json
import os
import pickle
import traceback

import pytest

from arkor_ray.errors import InvalidRequestError, ModelError
from arkor_ray.settings import Settings


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("ARKOR_RAY_", "AWS_", "PGPASSWORD", "RAY_AUTH")):
            monkeypatch.delenv(name)


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def refusal(monkeypatch, **variables: str) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(f"ARKOR_RAY_{name}", value)
    with pytest.raises(InvalidRequestError) as caught:
        Settings.load()
    return caught.value.message


def test_the_embedded_default_needs_nothing_set_and_keeps_everything_in_its_data_directory(tmp_path):
    settings = Settings.load(data_dir=tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path}/arkor.db"
    assert settings.storage_url == tmp_path.as_uri() + "/storage"
    assert settings.local_url == "http://127.0.0.1:8000"


def test_a_child_process_reads_the_same_settings(tmp_path, monkeypatch, model_dir):
    parent = Settings.load(
        data_dir=tmp_path, models=f"tiny={model_dir},org/base", anonymous=False, public_url="https://arkor.example"
    )
    for name, value in parent.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.load() == parent


def test_a_child_process_reads_the_catalogue_that_was_there_at_start(tmp_path, monkeypatch, model_dir):
    path = tmp_path / "catalogue.yaml"
    entry = {"name": "größer 🦙", "source": str(model_dir), "aliases": ['a "b"'], "serving": {"gpus": 0.25}}
    path.write_text(json.dumps({"models": [entry]}, ensure_ascii=False))
    parent = Settings.load(data_dir=tmp_path, catalogue=path, models="big=Qwen/Qwen3-8B@v1")
    path.write_text("models: []")
    for name, value in parent.environment().items():
        monkeypatch.setenv(name, value)
    child = Settings.load()
    assert child == parent and pickle.loads(pickle.dumps(parent)) == parent
    assert child.model_names() == ["größer 🦙", 'a "b"', "big"]
    assert child.find_model("Größer 🦙").serving.gpus == 0.25


def test_a_misspelt_setting_is_refused_with_the_name_it_may_have_meant(monkeypatch):
    message = refusal(monkeypatch, STORAGE_URI="s3://bucket")
    assert "ARKOR_RAY_STORAGE_URI" in message
    assert "did you mean ARKOR_RAY_STORAGE_URL" in message


@pytest.mark.parametrize(
    ("variables", "remedy"),
    [
        ({"CLUSTER": "1", "STORAGE_URL": "s3://b"}, "ARKOR_RAY_DATABASE_URL=postgresql://"),
        ({"CLUSTER": "1", "DATABASE_URL": "postgresql://h/d"}, "ARKOR_RAY_STORAGE_URL=s3://"),
        ({"S3_ENDPOINT_URL": "http://127.0.0.1:9000"}, "ARKOR_RAY_STORAGE_URL"),
        ({"DATABASE_URL": "mysql://h/d"}, "postgresql://"),
        ({"DATABASE_URL": "postgresql://u:a@b:c@h/d"}, "ARKOR_RAY_DATABASE_URL cannot be read"),
        ({"STORAGE_URL": "file://dir"}, "three slashes"),
        ({"STORAGE_URL": "gs://bucket"}, "s3://bucket/prefix"),
        ({"STORAGE_URL": "s3:///prefix"}, "s3://bucket/prefix"),
        ({"PORT": "70000"}, "ARKOR_RAY_PORT"),
        ({"TOKEN_DAYS": "soon"}, "ARKOR_RAY_TOKEN_DAYS"),
        ({"MODELS": "tiny=relative/dir/of/a/model"}, "tiny=relative/dir/of/a/model"),
        ({"MODELS": "tiny=/nowhere"}, "config.json"),
        ({"MODELS": "tiny=a/b,Tiny=c/d"}, "names two base models"),
        ({"MODELS": "tiny=a/b,tiny=c/d"}, "ARKOR_RAY_MODELS: tiny is there twice"),
        ({"CATALOGUE": "/nowhere.yaml"}, "ARKOR_RAY_CATALOGUE: /nowhere.yaml cannot be read"),
        (
            {"CATALOGUE": "{models: [{name: house, source: /nowhere}]}"},
            "base model house: /nowhere is not a model directory",
        ),
        ({"CATALOGUE": "{models: [{name: a/b, revision: v1}]}", "MODELS": "A/B=c/d"}, "a/b@v1 (entry a/b)"),
        ({"S3_ENDPOINT_URL": "127.0.0.1:9000"}, "ARKOR_RAY_S3_ENDPOINT_URL: '127.0.0.1:9000' must begin with http://"),
        ({"S3_ENDPOINT_URL": "http://"}, "name a host, as in http://127.0.0.1:9000"),
        ({"S3_ENDPOINT_URL": "http://minio:port"}, "name a host"),
        ({"S3_ENDPOINT_URL": "http://me:k7Qv2mR9@minio"}, "AWS_SECRET_ACCESS_KEY"),
        ({"PUBLIC_URL": "foo"}, "ARKOR_RAY_PUBLIC_URL: 'foo' must begin with http:// or https://"),
        ({"PUBLIC_URL": "https://arkor example"}, "as in https://arkor.example.com"),
        ({"ENDPOINTS_DOMAIN": "https://models.example.com"}, "without scheme"),
        ({"ENDPOINTS_DOMAIN": "models.example.com:8000"}, "without scheme or port"),
    ],
)
def test_what_cannot_work_is_refused_at_start_with_the_setting_to_change(monkeypatch, variables, remedy):
    assert remedy in refusal(monkeypatch, **variables)


@pytest.mark.parametrize(
    ("values", "url"),
    [
        ({}, "http://127.0.0.1:8000/e/triage/v1"),
        ({"public_url": "https://arkor.example/api/"}, "https://arkor.example/api/e/triage/v1"),
        ({"endpoints_domain": "Models.Example.com"}, "http://triage.models.example.com:8000/v1"),
        ({"endpoints_domain": ".x.org", "public_url": "https://arkor.example/api"}, "https://triage.x.org/v1"),
    ],
)
def test_an_endpoint_answers_below_its_domain_else_below_the_api(tmp_path, values, url):
    assert Settings.load(data_dir=tmp_path, **values).endpoint_url("triage") == url


CLUSTER = {"CLUSTER": "1", "DATABASE_URL": "postgresql://arkor:k7Qv2mR9xT4w@db/arkor", "STORAGE_URL": "s3://bucket/x"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "gpu-box"])
def test_who_lets_other_machines_in_must_say_whether_anybody_gets_a_token(monkeypatch, host):
    sentence = refusal(monkeypatch, HOST=host)
    assert f"ARKOR_RAY_HOST={host}" in sentence and "ARKOR_RAY_ANONYMOUS=0" in sentence
    for said in ("0", "1"):
        monkeypatch.setenv("ARKOR_RAY_ANONYMOUS", said)
        assert Settings.load().anonymous is (said == "1")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_on_this_machine_alone_anybody_gets_a_token(host):
    assert Settings.load(host=host).anonymous is True


def test_on_a_cluster_nobody_gets_a_token_unless_that_is_said(monkeypatch):
    for name, value in CLUSTER.items():
        monkeypatch.setenv(f"ARKOR_RAY_{name}", value)
    assert Settings.load().anonymous is False and Settings.load(host="0.0.0.0").anonymous is False
    assert Settings.load(anonymous=True).anonymous is True


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ARKOR_RAY_DATABASE_URL": "postgresql://arkor:changeme@db/arkor"}, "ARKOR_RAY_DATABASE_URL"),
        ({"AWS_ACCESS_KEY_ID": "minioadmin", "AWS_SECRET_ACCESS_KEY": "minioadmin"}, "AWS_SECRET_ACCESS_KEY"),
        ({"RAY_AUTH_TOKEN": "changeme"}, "RAY_AUTH_TOKEN"),
    ],
)
def test_a_cluster_is_not_started_with_a_secret_that_everybody_knows(monkeypatch, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    given = {name: value for name, value in CLUSTER.items() if f"ARKOR_RAY_{name}" not in variables}
    sentence = refusal(monkeypatch, **given)
    assert named in sentence and "changeme" not in sentence and "minioadmin" not in sentence
    monkeypatch.delenv("ARKOR_RAY_CLUSTER")
    Settings.load()  # one machine is for trying things


def test_settings_show_their_secrets_nowhere(monkeypatch):
    url = "postgresql://arkor:k7Qv2mR9xT4w@db/arkor"
    assert "k7Qv2mR9xT4w" not in repr(Settings.load(database_url=url)) + str(Settings.load(database_url=url))
    for bad in ({"storage_url": "gs://x"}, {"port": "many"}, {"cluster": True}):
        with pytest.raises(InvalidRequestError) as raised:
            Settings.load(**{"database_url": url, **bad})
        assert "k7Qv2mR9xT4w" not in "".join(traceback.format_exception(raised.value))


def test_an_empty_variable_is_as_good_as_none(monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_PORT", "")
    assert Settings.load().port == 8000


def test_models_are_found_by_name_whatever_its_case(model_dir):
    settings = Settings.load(models=f"unsloth/gemma-4-E4B-it={model_dir}, org/base")
    assert settings.resolve_model("Unsloth/Gemma-4-e4b-it") == str(model_dir)
    assert settings.resolve_model("org/base") == "org/base"
    with pytest.raises(ModelError, match="unsloth/gemma-4-E4B-it, org/base"):
        settings.resolve_model("org/other")


def test_a_model_of_the_catalogue_is_found_with_all_that_is_said_about_it(model_dir, tmp_path):
    text = f"{{models: [{{name: house, source: {model_dir}, aliases: [Gemma], serving: {{slots: 3}}}}]}}"
    settings = Settings.load(catalogue=text, models="house=" + str(model_dir) + ",small=a/b@v1")
    assert settings.model_names() == ["house", "Gemma", "small"]
    assert settings.find_model("GEMMA") == settings.base_models.of_base(str(model_dir))
    assert settings.find_model("GEMMA").serving.slots == 3
    assert settings.resolve_model("small") == "a/b@v1"
    with pytest.raises(ModelError, match="house, Gemma, small") as caught:
        settings.find_model("other")
    assert caught.value.param == "config.model" and "ARKOR_RAY_CATALOGUE" in caught.value.message


def test_a_model_in_s3_may_have_an_endpoint_though_the_storage_is_local():
    settings = Settings.load(catalogue="{models: [{name: x, source: 's3://bucket/x'}]}", s3_endpoint_url="http://h:1")
    assert settings.resolve_model("x") == "s3://bucket/x"


def test_a_star_admits_every_hub_id_and_nothing_else(model_dir):
    settings = Settings.load(models="*")
    assert settings.resolve_model("org/anything") == "org/anything"
    for name in ("../etc", "anything", str(model_dir)):
        with pytest.raises(ModelError):
            settings.resolve_model(name)


def test_a_hub_id_that_is_a_directory_here_is_no_hub_id(model_dir, monkeypatch):
    monkeypatch.chdir(model_dir.parent.parent)
    settings = Settings.load(models="*")
    with pytest.raises(ModelError):
        settings.resolve_model(f"{model_dir.parent.name}/{model_dir.name}")


def test_local_models_are_for_the_operator_to_allow(model_dir, tmp_path):
    with pytest.raises(ModelError, match="ARKOR_RAY_MODELS_ALLOW_LOCAL_PATHS=1"):
        Settings.load().resolve_model(str(model_dir))
    allowed = Settings.load(models_allow_local_paths=True)
    assert allowed.resolve_model(str(model_dir)) == str(model_dir)
    with pytest.raises(ModelError, match=r"no config\.json"):
        allowed.resolve_model(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("host", "url"), [("::1", "http://[::1]:8000"), ("::", "http://[::1]:8000"), ("0.0.0.0", "http://127.0.0.1:8000")]
)
def test_this_machine_reaches_the_api_whatever_it_listens_on(host, url):
    assert Settings.load(host=host, anonymous=False).local_url == url
