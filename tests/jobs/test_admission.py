"""What is refused before a job exists: data that this server must not fetch, by whatever name it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arkor_ray.catalogue import read_catalogue
from arkor_ray.errors import DatasetError, InvalidRequestError, ModelError
from arkor_ray.jobs.admission import AcceptedJob, accept, is_private_host
from arkor_ray.schemas.job import JobCreate
from arkor_ray.settings import Settings


def submit(source: dict[str, Any], settings: dict[str, Any] | None = None, **config: Any) -> AcceptedJob:
    allowed = Settings(data_dir=Path("unused"), models={"tiny": "base/tiny"}, **(settings or {}))
    return accept(allowed, JobCreate(name="x", config={"model": "tiny", "datasetSource": source, **config}))


def blob(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "blob", "url": url, **fields}


def test_accepted_job_keeps_the_config_but_for_its_token() -> None:
    config = {"model": "tiny", "datasetSource": blob("https://a.example/x", token="secret", more=1), "extra": [1]}
    sent = JobCreate(name="x", config=config)
    accepted = accept(Settings(data_dir=Path("unused"), models={"tiny": "base/tiny"}), sent)
    assert accepted.dataset_token == "secret"
    assert accepted.config == {**config, "datasetSource": blob("https://a.example/x", more=1)}
    assert sent.config["datasetSource"]["token"] == "secret", "what was sent is not changed under its owner"


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST.",
        "db.localhost",
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:10.0.0.1",
        "::ffff:a9fe:a9fe",
        "2002:7f00:1::",
        "64:ff9b::10.0.0.1",
        "ff02::1",
    ],
)
def test_private_address_is_refused_however_it_is_spelt(host: str) -> None:
    assert is_private_host(host)
    url = f"http://[{host}]/x" if ":" in host else f"http://{host}:8080/x"
    with pytest.raises(DatasetError, match="private") as raised:
        submit(blob(url))
    assert raised.value.param == "config.datasetSource.url"
    assert submit(blob(url), {"datasets_allow_private_hosts": True})


@pytest.mark.parametrize(
    "host", ["example.com", "8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8", "localhost.example.com", "10.example.com"]
)
def test_public_host_is_accepted(host: str) -> None:
    assert not is_private_host(host)
    assert submit(blob(f"https://[{host}]/x" if ":" in host else f"https://{host}/x"))


def test_local_file_needs_the_operators_leave() -> None:
    with pytest.raises(DatasetError, match="ARKOR_RAY_DATASETS_ALLOW_LOCAL_PATHS"):
        submit(blob("file:///data/rows.jsonl"))
    with pytest.raises(DatasetError):
        submit(blob("file:///data/rows.jsonl"), {"datasets_allow_private_hosts": True})
    assert submit(blob("file:///data/rows.jsonl"), {"datasets_allow_local_paths": True})


@pytest.mark.parametrize(
    "url", ["https://host:99999/x", "https://host:port/x", "https://user:pass@host/x", "https://[::1", "x"]
)
def test_url_that_is_none_is_refused_by_name(url: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        submit(blob(url))
    assert raised.value.param == "config.datasetSource.url"


@pytest.mark.parametrize("name", ["arkorlab/triage-demo", "a_b/c.d-e"])
def test_name_of_the_hub_is_accepted(name: str) -> None:
    assert submit({"type": "huggingface", "name": name, "split": "train[:500]"}).dataset_token is None


@pytest.mark.parametrize(
    "name", ["json", "/etc", "./rows", "../rows", "a/../b", "a/b/c", "https://x/y", "a b", "~/x", "a/.b", "-a"]
)
def test_path_is_no_name_of_the_hub(name: str) -> None:
    """`datasets` would load a directory of the server by such a name."""
    with pytest.raises(DatasetError) as raised:
        submit({"type": "huggingface", "name": name})
    assert raised.value.param == "config.datasetSource.name"


def test_workers_are_limited_by_the_operator() -> None:
    source = {"type": "huggingface", "name": "a/b"}
    assert submit(source, {"max_workers_per_job": 2}, numWorkers=2)
    with pytest.raises(InvalidRequestError, match="3 is more than this server allows, 2"):
        submit(source, {"max_workers_per_job": 2}, numWorkers=3)


def test_workers_are_limited_by_model_where_the_catalogue_says_so() -> None:
    source = {"type": "huggingface", "name": "a/b"}
    settings = {
        "catalogue": read_catalogue(
            "{models: [{name: big, source: a/b, aliases: [Large], training: {max_workers: 4}}]}"
        ),
        "max_workers_per_job": 2,
    }
    assert submit(source, settings, model="BIG", numWorkers=4).config["model"] == "BIG", "the name is echoed as it came"
    with pytest.raises(InvalidRequestError, match=r"5 is more .* 4; .* training\.max_workers of big") as raised:
        submit(source, settings, model="large", numWorkers=5)
    assert raised.value.param == "config.numWorkers"
    with pytest.raises(InvalidRequestError, match="ARKOR_RAY_MAX_WORKERS_PER_JOB"):
        submit(source, settings, model="tiny", numWorkers=3)


def test_model_must_be_in_the_catalogue() -> None:
    listed = read_catalogue("{models: [{name: big, source: a/b, aliases: [Large]}]}")
    with pytest.raises(ModelError, match="big, Large, tiny") as raised:
        submit({"type": "huggingface", "name": "a/b"}, {"catalogue": listed}, model="other")
    assert raised.value.param == "config.model"


def test_config_is_no_place_for_data() -> None:
    """Lists of jobs show every one's."""
    with pytest.raises(InvalidRequestError, match="more than 65536; give data by datasetSource") as raised:
        submit(blob("https://a.example/x"), rows=["x" * 1000] * 66)
    assert raised.value.param == "config"
    assert submit(blob("https://a.example/x"), rows=["x" * 1000] * 60)
